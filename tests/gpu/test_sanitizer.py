"""NVIDIA's compute-sanitizer finds no access out of bounds and no race in a proof of each family."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
FOUND = 9


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_a_proof_of_each_family_does_nothing_forbidden(check: str) -> None:
    command = [
        str(TOOL),
        "--tool",
        check,
        "--error-exitcode",
        str(FOUND),
        sys.executable,
        "-m",
        "tests.gpu.first_cases",
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not work with this device's driver")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout
