"""Runs the installed `cloister` command, and a real appliance with it."""

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLOISTER = Path(sys.executable).with_name("cloister")


def cloister(*words: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """One command, as a shell in `cwd` would run it."""
    return subprocess.run(
        [str(CLOISTER), *map(str, words)],
        cwd=cwd,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def initialise(home: Path, root: Path, cwd: Path, site: str = "here") -> None:
    """A home whose operator is the present user."""
    user = pwd.getpwuid(os.getuid()).pw_name
    words = ("--operator", f"a={user}", "--site", site, "--root", root)
    made = cloister("--home", home, "init", *words, cwd=cwd)
    assert made.returncode == 0, made.stderr


@contextmanager
def serving(home: Path, cwd: Path) -> Iterator[None]:
    """`cloister serve` in `cwd`, from ready to a clean exit."""
    command = [str(CLOISTER), "--home", str(home), "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        command, cwd=cwd, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("ready on"):
                    break
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            said += process.stdout.readlines()
            assert process.wait(60) == 0, "".join(said)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
