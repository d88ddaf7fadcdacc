"""The proofs of the kernels under the other versions of Triton that they keep to, which pip fetches for this.

Triton is laid over this interpreter's packages, without what it depends on: kernels are interpreted and compiled
on the CPU, where torch does not ask for a certain Triton.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_triton_compile import compile_all, faults
from tests.kernels.triton_machine import ROOT, Server, build, needs_compiler

VERSIONS = {
    "3.6.0": ("triton==3.6.0", "numpy==2.3.5"),  # its interpreter does not know numpy from 2.4 on
    "3.9.0": ("triton==3.9.0",),
}

SMALL_SPILLS = tuple(f" spills {count} bytes" for count in range(4, 65, 4))
"""Another compiler shares registers out otherwise; configurations are chosen for the one that the product has."""

PROOFS = """
import sys
import pytest
from triton.runtime.interpreter import InterpreterBuilder

splat = InterpreterBuilder.create_splat

def splat_of_truths(self, kind, scalar):
    made = splat(self, kind, scalar)
    if scalar.data.dtype == bool:
        made.data = made.data.astype(bool)
    return made

InterpreterBuilder.create_splat = splat_of_truths
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/kernels/test_triton_numerics.py"]))
"""
"""A scalar's truth spread over a block is an integer in all interpreters, and from 3.9 on refused as a mask; the
compiler knows no difference."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=VERSIONS)
def packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another Triton."""
    folder = tmp_path_factory.mktemp("triton") / str(request.param)
    pip = (
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--target",
        str(folder),
    )
    done = subprocess.run([sys.executable, *pip, *VERSIONS[request.param]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip has no Triton {request.param} here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_kernels_are_as_exact(packages: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROOFS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(packages), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_kernels_compile_as_well_but_for_a_few_registers(packages: Path, tmp_path: Path) -> None:
    found = faults(compile_all(tmp_path, PYTHONPATH=str(packages)))
    assert [fault for fault in found if not fault.endswith(SMALL_SPILLS)] == []


@needs_compiler
def test_a_server_without_a_compiler_finds_every_kernel(packages: Path, tmp_path: Path) -> None:
    cache = build(tmp_path / "cache", "--only", "norm", PYTHONPATH=str(packages))
    kernels = len(list((cache / "kernels").iterdir()))
    moved = cache.rename(tmp_path / "moved")
    server = tmp_path / "server"
    server.mkdir()
    answer = Server(server, packages).serve(moved, "norm", "changed")
    assert (answer["hits"], answer["misses"]) == (kernels, 0)
    assert answer["changed"].startswith("KERNEL_NOT_COMPILED")
