"""What every test run says: seconds per test folder, kernels proven; in CI, that nothing was skipped wrongly.

Where there is no CUDA device kernels in Triton run in its interpreter, which is chosen before they are imported,
and the tests under `tests/gpu` are left out, which the last lines of a run say.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

HAS_DEVICE = Path("/dev/nvidiactl").exists()
if not HAS_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore = [] if HAS_DEVICE else ["gpu"]

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")

_seconds: Counter[str] = Counter()
_skipped: list[str] = []
_kernels: Counter[str] = Counter()


def folder_of(nodeid: str) -> str:
    """tests/engine/test_x.py::test_y -> tests/engine; a test right under tests/ belongs to tests."""
    return "/".join(nodeid.partition("::")[0].split("/")[:-1][:2])


def allowed(nodeid: str, patterns: list[str]) -> bool:
    """A pattern is a node id, or the beginning of one."""
    return any(nodeid.startswith(pattern) for pattern in patterns)


def patterns_of(text: str) -> list[str]:
    """One pattern a line, behind it a # and the reason."""
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.partition("#")[0].strip()]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[folder_of(report.nodeid)] += report.duration
    if report.when == "call" and report.passed:
        _kernels["proven"] += report.nodeid.startswith("tests/kernels/test_triton_numerics.py::")
        _kernels["compiled"] += dict(report.user_properties).get("compiled for sm_90", 0)
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected_skips() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("seconds per folder")
    for folder, seconds in sorted(_seconds.items()):
        terminalreporter.line(f"{seconds:8.1f}  {folder}")
    for line in _about_kernels():
        terminalreporter.line(line)
    for nodeid in _unexpected_skips():
        terminalreporter.line(f"skipped, and not in {ALLOWED_SKIPS.name}: {nodeid}", red=True)


def _about_kernels() -> list[str]:
    """What was shown of the kernels in Triton, and what could not be."""
    where = "on a device" if HAS_DEVICE else "in the interpreter"
    shown = f"{_kernels['proven']} kernels' cases proven {where}, {_kernels['compiled']} compiled for sm_90"
    return [shown] * (_kernels.total() > 0) + ["tests/gpu NOT RUN: no CUDA device"] * (not HAS_DEVICE)


def _unexpected_skips() -> list[str]:
    """What CI does not let pass: a test that did not run, without a reason somebody wrote down."""
    if not os.environ.get("CI"):
        return []
    patterns = patterns_of(ALLOWED_SKIPS.read_text())
    return [nodeid for nodeid in _skipped if not allowed(nodeid, patterns)]
