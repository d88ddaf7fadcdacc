"""Every kernel in Triton with the sizes of published models, compiled to machine code without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.triton.offline import SHARED_BYTES

TARGET = 90


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each kernel came to; compiled in a process that does not interpret, into a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "kernels.triton.offline", "--target", str(TARGET)],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(compiled: list[dict[str, object]]) -> None:
    assert [(one["kernel"], one["error"]) for one in compiled if one["error"]] == []


def test_no_kernel_spills_registers(compiled: list[dict[str, object]]) -> None:
    assert [(one["kernel"], one["spilled"]) for one in compiled if one["spilled"]] == []


def test_every_block_fits_shared_memory(compiled: list[dict[str, object]]) -> None:
    assert [one["kernel"] for one in compiled if int(str(one["shared"])) > SHARED_BYTES[TARGET]] == []
