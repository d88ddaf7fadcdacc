"""A command run from a stranger's medium imports nothing that lies there."""

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles.making import make_model

CLOISTER = Path(sys.executable).with_name("cloister")
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


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    """A folder whose modules leave a trace when they run."""
    folder = tmp_path / "stick"
    for name in _SHADOWED:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + '\\n')\nraise SystemExit(0)\n")
    return folder


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as folder:
        yield Path(folder) / "h"


def _run(stick: Path, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(CLOISTER), *map(str, words)],
        cwd=stick,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _serve_until_ready(stick: Path, home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(CLOISTER), "--home", str(home), "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        command, cwd=stick, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready on"):
                break
        process.send_signal(signal.SIGTERM)
        said += process.stdout.readlines()
        assert process.wait(60) == 0, "".join(said)


def test_no_verb_that_starts_a_process_runs_a_module_of_the_current_directory(
    stick: Path, tmp_path: Path, home: Path
) -> None:
    model, bundle, keys = make_model(tmp_path / "m"), tmp_path / "b", tmp_path / "keys"
    root = ("--root", keys / "root.json")
    assert _run(stick, "trust", "init", "--out", keys).returncode == 0
    words = ("--model", model, "--name", "x", "--version", "1", "--sequence", "1", "--out", bundle)
    # The tiny model is none that the real engine-inspect knows; that it says so shows that it was the one asked.
    built = _run(stick, "bundle", "build", *words)
    assert (built.returncode, "INSPECT_" in built.stderr) == (3, False), built.stderr
    user = pwd.getpwuid(os.getuid()).pw_name
    made = _run(stick, "--home", home, "init", "--operator", f"a={user}", "--site", "s", *root)
    assert made.returncode == 0, made.stderr
    control = home / "control"
    public = control / "keys" / "audit-head.pub"
    judged = _run(stick, "audit", "verify", "--file", control / "audit.db", "--key", public)
    assert "verdict       intact" in judged.stdout, judged.stderr
    _run(stick, "--home", home, "doctor")
    _serve_until_ready(stick, home)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
