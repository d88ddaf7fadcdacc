"""What every test run says: seconds per test folder; in CI, that nothing was skipped which must not be.

Where there is no CUDA device kernels in Triton run in its interpreter, which is chosen before they are imported.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")

_seconds: Counter[str] = Counter()
_skipped: list[str] = []


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
    for nodeid in _unexpected_skips():
        terminalreporter.line(f"skipped, and not in {ALLOWED_SKIPS.name}: {nodeid}", red=True)


def _unexpected_skips() -> list[str]:
    """What CI does not let pass: a test that did not run, without a reason somebody wrote down."""
    if not os.environ.get("CI"):
        return []
    patterns = patterns_of(ALLOWED_SKIPS.read_text())
    return [nodeid for nodeid in _skipped if not allowed(nodeid, patterns)]
