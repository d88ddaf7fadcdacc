"""The other implementations, in a virtual environment of their own; without it these tests are not run."""

import subprocess
from pathlib import Path

import pytest

VENV = Path(__file__).parents[2] / ".venv-interop"


@pytest.fixture(scope="session")
def interop() -> Path:
    """The folder of the environment's programs."""
    programs = VENV / "bin"
    if not (programs / "model_signing").exists():
        pytest.skip(
            f"NOT RUN: {VENV} is not there; python3 -m venv {VENV.name} && {VENV.name}/bin/pip install "
            "--require-hashes --no-deps -r tests/interop/requirements.txt"
        )
    return programs


def run(programs: Path, *words: str | Path, status: int = 0) -> str:
    """Run a program of the environment; what it printed."""
    program, *rest = map(str, words)
    done = subprocess.run(
        [programs / program, *rest],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin"},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr
