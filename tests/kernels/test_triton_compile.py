"""Every kernel in Triton, compiled to machine code without a device: none spills, all fit, promises are kept."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.triton.case import MODEL, PROOF
from kernels.triton.configs import DEFAULT
from kernels.triton.offline import TARGETS, converts_in_loops

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted(path.stem for path in (ROOT / "kernels" / "configs").glob("*.json") if path.stem != DEFAULT)


def compile_all(cache: Path, *words: str, **more: str) -> list[dict[str, Any]]:
    """What each kernel came to; compiled in processes that do not interpret, into a cache of their own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.triton.offline", *words],
        env=environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | more,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert found, done.stderr
    assert done.returncode == any(one["faults"] for one in found), done.stderr
    return found


def faults(compiled: list[dict[str, Any]]) -> list[str]:
    return [
        f"{one['kernel']} {one['key']} for sm_{one['target']} {fault}"
        for one in compiled
        for fault in one["faults"]
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of the sizes of published models, for Hopper."""
    return compile_all(tmp_path_factory.mktemp("triton"), "--target", "90", "--scale", MODEL)


def test_kernels_compile_without_spills_fit_and_keep_their_families_promises(
    compiled: list[dict[str, Any]], record_property: Callable[[str, int], None]
) -> None:
    assert faults(compiled) == []
    record_property("compiled for sm_90", len(compiled))  # in the last lines of a run


def test_every_kernel_that_promises_something_was_compiled(compiled: list[dict[str, Any]]) -> None:
    from kernels.triton.offline import promises

    assert set(promises()) <= {one["kernel"] for one in compiled}


def test_hopper_is_refused_nothing(compiled: list[dict[str, Any]]) -> None:
    assert [one["refused"] for one in compiled if one["refused"]] == []


SASS = """
        /*0000*/                   I2F R1, R2 ;                   /* 0x0 */
        /*0010*/                   IADD3 R1, R2, 0x1, RZ ;        /* 0x0 */
        /*0020*/                   {converting} R3, R1 ;          /* 0x0 */
        /*0030*/              @P0  BRA 0x10 ;                     /* 0x0 */
        /*0040*/                   I2FP.F32.S32 R1, R2 ;          /* 0x0 */
        /*0050*/                   BRA 0x50;                      /* 0x0 */
"""


@pytest.mark.parametrize(("converting", "count"), [("I2FP.F32.U32", 1), ("I2F.RP", 1), ("FADD", 0)])
def test_floats_of_integers_count_inside_loops_alone(converting: str, count: int) -> None:
    assert converts_in_loops(SASS.replace("{converting}", converting)) == count


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_all_sizes_compile_for_every_device(target: int, tmp_path: Path) -> None:
    found = [one for scale in (PROOF, MODEL)
             for one in compile_all(tmp_path, "--target", str(target), "--scale", scale)]  # fmt: skip
    assert faults(found) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("table", [DEFAULT, *TABLES])
def test_every_configuration_of_every_table_compiles(table: str, tmp_path: Path) -> None:
    assert faults(compile_all(tmp_path, "--table", table, "--all-configs")) == []
