"""The machines of a cache of compiled kernels: one with a compiler, and a server that has none, but a driver."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="caches are built where there is a compiler"
)


def environment(**more: str) -> dict[str, str]:
    """Of a process that does not interpret kernels, and knows no cache."""
    without = {"TRITON_INTERPRET", "TRITON_CACHE_DIR", "CC", "CLOISTER_TRITON_CACHE"}
    return (
        {name: value for name, value in os.environ.items() if name not in without}
        | {"OMP_NUM_THREADS": "1"}
        | more
    )


def build(folder: Path, *words: str, python: Sequence[str] = (sys.executable,), **more: str) -> Path:
    """A cache, by the command line."""
    device = ("--device", "NVIDIA H200", "--capability", "9.0")
    done = subprocess.run([*python, "-m", "kernels.aot", "build", str(folder), *device, *words],
                          cwd=ROOT, env=environment(**more), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def make_driver(folder: Path, packages: Path | None = None) -> Path:
    """A folder with libcuda.so.1, which has all names that Triton's C modules call.

    Args:
        folder: for it.
        packages: where Triton lies; None: that of this process.
    """
    import triton

    code = Path(__file__).with_name("libcuda.c").read_text()
    nvidia = (packages or Path(triton.__file__).parents[1]) / "triton" / "backends" / "nvidia"
    called = {name for file in nvidia.glob("driver.*") for name in re.findall(r"\bcu[A-Z]\w+", file.read_text())}
    called -= set(re.findall(r"\bcu[A-Z]\w+", code))
    folder.mkdir()
    source = folder / "libcuda.c"
    source.write_text(code + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(called)))
    library = ("-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1")
    subprocess.run(["gcc", *library, source.name], cwd=folder, check=True)
    return folder


class Server:
    """A machine where the program and the cache lie elsewhere, nothing can compile C, and a driver is there.

    Args:
        folder: for all of it.
        packages: of another Triton than this process's.
    """

    def __init__(self, folder: Path, packages: Path | None = None) -> None:
        self._program, self._bin = folder / "program", folder / "bin"
        for package in ("kernels", "tests/kernels"):
            kinds = shutil.ignore_patterns("__pycache__", "native/src")
            shutil.copytree(ROOT / package, self._program / package, ignore=kinds)
        self._bin.mkdir()
        driver = make_driver(folder / "driver", packages)
        paths = [str(self._program), *([str(packages)] if packages else [])]
        self._environment = environment(
            PATH=str(self._bin), LD_LIBRARY_PATH=str(driver), PYTHONPATH=":".join(paths)
        )

    def serve(self, cache: Path, *words: str) -> dict[str, Any]:
        """What a process of `tests.kernels.triton_server` answers, which has this cache."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tests.kernels.triton_server", str(cache), *words],
            cwd=self._program,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert answer.pop("compilers") == []
        return answer
