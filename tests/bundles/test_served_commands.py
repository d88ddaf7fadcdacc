"""The installed command with a real appliance, all of it started in a folder full of hostile modules."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bundles.making import Trust, make_bundle, make_model
from tests.bundles.serving import cloister, initialise, serving

# What children run with `-m`, and a module that every one of them imports.
_SHADOWED = (
    "json.py",
    "engine/__init__.py",
    "engine/inspect/__init__.py",
    "engine/inspect/__main__.py",
    "engine/host/__main__.py",
    "appliance/__init__.py",
    "appliance/control/__init__.py",
    "appliance/control/__main__.py",
    "appliance/control/init.py",
    "appliance/control/audit/__init__.py",
    "appliance/control/audit/__main__.py",
    "appliance/gateway/__main__.py",
    "bundles/__init__.py",
    "bundles/importer/__main__.py",
    "torch.py",
)


@dataclass(frozen=True)
class Served:
    """An appliance that runs.

    Attributes:
        home: its home; its site is ward-3.
        stick: the folder that it was started in, whose modules leave a trace when they run.
        trace: where.
        root: its root of trust.
    """

    home: Path
    stick: Path
    trace: Path
    root: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, trust: Trust) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    stick, trace, root = folder / "stick", folder / "ran", folder / "root.json"
    root.write_bytes(trust.root.raw)
    for name in _SHADOWED:
        path = stick / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(trace)!r}, 'a').write({name!r} + '\\n')\nraise SystemExit(0)\n")
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as short:  # sockets lie in it
        home = Path(short) / "h"
        initialise(home, root, stick, site="ward-3")
        with serving(home, stick):
            yield Served(home, stick, trace, root)


def _refusal(served: Served, *words: str | Path) -> tuple[int, str]:
    """Exit status and code."""
    done = cloister("--home", served.home, *words, cwd=served.stick)
    return done.returncode, done.stderr.splitlines()[-1].split(": ")[1]


def test_an_import_ends_with_the_exit_status_of_its_code(tmp_path: Path, served: Served, trust: Trust) -> None:
    elsewhere = make_bundle(tmp_path / "elsewhere.bundle", trust, targets=("ward-4",))
    here = make_bundle(tmp_path / "here.bundle", trust, targets=("ward-3",))
    assert _refusal(served, "bundle", "import", tmp_path / "absent") == (1, "SOURCE_UNREADABLE")
    assert _refusal(served, "bundle", "import", tmp_path) == (3, "CONTAINER_MISSING")
    assert _refusal(served, "bundle", "import", elsewhere) == (3, "WRONG_TARGET")
    # It is let in, as far as the real engine-inspect, which knows no such tiny model.
    status, code = _refusal(served, "bundle", "import", here)
    assert status == 3
    assert code not in ("WRONG_TARGET", "INSPECT_FAILED", "INTERNAL")
    no_text = cloister("--home", served.home, "bundle", "import", "a\udcff.bundle", cwd=served.stick)
    assert no_text.returncode == 2
    assert "INTERNAL" not in no_text.stderr


def test_no_process_runs_a_module_of_the_directory_it_was_started_in(
    served: Served, tmp_path: Path, signed_once: Path
) -> None:
    model = make_model(tmp_path / "m")
    words = ("--model", model, "--name", "x", "--version", "1", "--sequence", "1", "--out", tmp_path / "b")
    # The tiny model is none that the real engine-inspect knows; that it says so shows that it was the one asked.
    for command in (
        ("bundle", "build", *words),
        ("bundle", "verify", signed_once, "--root", served.root),
        ("bundle", "import", signed_once),
    ):
        status, code = _refusal(served, *command)
        assert (status, code.startswith("INSPECT_")) == (3, False), command
    control = served.home / "control"
    files = ("--file", control / "audit.db", "--key", control / "keys" / "audit-head.pub")
    assert '"size"' in cloister("--json", "audit", "verify", *files, cwd=served.stick).stdout
    cloister("--home", served.home, "doctor", cwd=served.stick)
    assert not served.trace.exists(), served.trace.read_text()


def test_the_trust_in_force_is_shown(served: Served, trust: Trust) -> None:
    shown = cloister("--home", served.home, "trust", "show", cwd=served.stick)
    assert shown.returncode == 0, shown.stderr
    assert "root of trust, version 1" in shown.stdout
    assert trust.release_key.key.keyid in shown.stdout
    told = json.loads(cloister("--home", served.home, "--json", "trust", "show", cwd=served.stick).stdout)
    assert {role["name"] for role in told["roles"]} == {"root", "release", "publisher"}
