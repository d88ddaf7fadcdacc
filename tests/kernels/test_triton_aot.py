"""Kernels compiled ahead of time: a server without a compiler starts them, and compiles none."""

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

from kernels import aot
from kernels.triton.cache import CacheError, check, write_manifest

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "norm"


def environment(**more: str) -> dict[str, str]:
    without = {"TRITON_INTERPRET", "TRITON_CACHE_DIR", "CC", "CLOISTER_TRITON_CACHE"}
    return (
        {name: value for name, value in os.environ.items() if name not in without}
        | {"OMP_NUM_THREADS": "1"}
        | more
    )


def built(folder: Path, *words: str, python: Sequence[str] = (sys.executable,), **more: str) -> Path:
    """A cache, by the command line."""
    device = ("--device", "NVIDIA H200", "--capability", "9.0")
    done = subprocess.run([*python, "-m", "kernels.aot", "build", str(folder), *device, *words],
                          cwd=ROOT, env=environment(**more), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Server:
    """Another machine: the program and the cache lie elsewhere, nothing can compile C, a driver is there.

    Args:
        folder: for all of it.
        python: the interpreter.
    """

    def __init__(self, folder: Path, python: Sequence[str] = (sys.executable,), **more: str) -> None:
        self._python, self._more = python, more
        self._program, self._driver, self._bin = folder / "program", folder / "driver", folder / "bin"
        for package in ("kernels", "tests/kernels"):
            kinds = shutil.ignore_patterns("__pycache__", "native/src")
            shutil.copytree(ROOT / package, self._program / package, ignore=kinds)
        self._bin.mkdir()
        self._driver.mkdir()
        self.with_driver()

    def with_driver(self) -> None:
        """libcuda.so.1, with all names that Triton's C modules call."""
        import triton

        code = Path(__file__).with_name("libcuda.c").read_text()
        nvidia = (
            Path(self._more.get("PYTHONPATH", "") or Path(triton.__file__).parents[1]) / "triton/backends/nvidia"
        )
        called = {
            name for file in nvidia.glob("driver.*") for name in re.findall(r"\bcu[A-Z]\w+", file.read_text())
        }
        called -= set(re.findall(r"\bcu[A-Z]\w+", code))
        source = self._driver / "libcuda.c"
        source.write_text(code + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(called)))
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", source.name],
            cwd=self._driver,
            check=True,
        )

    def serve(self, cache: Path, *words: str) -> dict[str, Any]:
        paths = [str(self._program), *filter(None, [self._more.get("PYTHONPATH")])]
        done = subprocess.run(
            [*self._python, "-P", "-m", "tests.kernels.triton_server", str(cache), FAMILY, *words],
            cwd=self._program,
            env=environment(PATH=str(self._bin), LD_LIBRARY_PATH=str(self._driver), PYTHONPATH=":".join(paths)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert answer.pop("compilers") == []
        return answer


needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="caches are built where there is a compiler"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one family, at the place where it was built."""
    return built(tmp_path_factory.mktemp("built") / "cache", "--only", FAMILY)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("server"))


@pytest.fixture
def moved(cache: Path, tmp_path: Path) -> Path:
    """The cache, installed at another place."""
    place = tmp_path / "elsewhere" / "triton"
    aot.install(cache, place)
    return place


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def answer(cache: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a server with the cache at another place, which starts all kernels and then one with another constant."""
    place = tmp_path_factory.mktemp("elsewhere") / "triton"
    aot.install(cache, place)
    before = tree(place)
    answer = server.serve(place, "changed")
    assert tree(place) == before
    return answer


@needs_compiler
def test_a_server_without_a_compiler_finds_every_kernel_in_a_cache_that_moved(
    cache: Path, answer: dict[str, Any]
) -> None:
    kernels = len(json.loads((cache / "manifest.json").read_text())["kernels"])
    assert (answer["hits"], answer["misses"]) == (kernels, 0)
    assert answer["started"] >= kernels


@needs_compiler
def test_a_changed_constant_is_an_error_by_name_after_warm_up(answer: dict[str, Any]) -> None:
    assert answer["changed"].startswith("KERNEL_NOT_COMPILED: kernel kernels.triton.norm._rms_norm")
    assert "num_warps=2" in answer["changed"]
    assert "WIDTH=4096" in answer["changed"]
    assert "python -m kernels.aot" in answer["changed"]


@needs_compiler
def test_a_developer_may_have_it_compiled(moved: Path, server: Server) -> None:
    answer = server.serve(moved, "changed", "may-compile")
    assert (answer["changed"], answer["misses"]) == ("started", 1)


@needs_compiler
def test_without_the_c_modules_a_server_says_what_to_build(server: Server, tmp_path: Path) -> None:
    write_manifest(tmp_path, [])
    assert server.serve(tmp_path)["error"].startswith("LIBRARY_NOT_BUILT: Triton's cuda_utils is in no cache")


def test_a_list_of_starts_gives_the_kernels_it_was_made_of() -> None:
    code = (
        "import json; from kernels.triton import launch_list, offline;"
        "starts = offline.launches('model');"
        "again = launch_list.from_json(json.loads(json.dumps(launch_list.to_json(starts))));"
        "assert starts and [offline.key(start) for start in again] == [offline.key(start) for start in starts]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_what_was_changed_after_it_was_built_is_not_loaded(moved: Path) -> None:
    assert check(moved)
    cubin = next(moved.glob("kernels/*/*.cubin"))
    cubin.chmod(0o600)
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match="CACHE_CHANGED"):
        check(moved)


@needs_compiler
def test_a_cache_that_others_may_write_is_not_loaded(moved: Path) -> None:
    next(moved.glob("kernels/*")).chmod(0o775)
    with pytest.raises(CacheError, match="CACHE_UNSAFE"):
        check(moved)


@needs_compiler
def test_installing_again_replaces_what_was_there(moved: Path, cache: Path) -> None:
    aot.install(cache, moved)
    assert [path.name for path in moved.parent.iterdir()] == ["triton"]
    assert check(moved)
