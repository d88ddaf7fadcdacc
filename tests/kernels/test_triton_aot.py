"""Kernels compiled ahead of time: a server without a compiler starts them, and compiles none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels import aot
from kernels.triton.cache import CacheError, check, write_manifest
from tests.kernels.triton_machine import ROOT, Server, build, environment, needs_compiler

FAMILY = "norm"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one family, at the place where it was built."""
    return build(tmp_path_factory.mktemp("built") / "cache", "--only", FAMILY)


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
    answer = server.serve(place, FAMILY, "changed")
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
    answer = server.serve(moved, FAMILY, "changed", "may-compile")
    assert (answer["changed"], answer["misses"]) == ("started", 1)


@needs_compiler
def test_without_the_c_modules_a_server_says_what_to_build(server: Server, tmp_path: Path) -> None:
    write_manifest(tmp_path, [])
    error = server.serve(tmp_path, FAMILY)["error"]
    assert error.startswith("LIBRARY_NOT_BUILT: Triton's cuda_utils is in no cache")


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


KEYS_IN_TWO_ORDERS = """
import importlib, pkgutil
import kernels.triton
from kernels.triton.cache import key_alike

key_alike()
names = [found.name for found in pkgutil.iter_modules(kernels.triton.__path__)]
modules = [importlib.import_module(f"kernels.triton.{name}") for name in names]
functions = {id(found): found for module in modules for found in vars(module).values() if hasattr(found, "warmup")}
keys = {which: found.cache_key for which, found in functions.items()}
for found in functions.values():
    found.hash, found.used_global_vals = None, {}
again = {which: functions[which].cache_key for which in reversed(functions)}
print([functions[which].fn.__name__ for which in functions if keys[which] != again[which]], len(functions))
"""


def test_a_key_does_not_depend_on_which_kernel_was_started_before() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEYS_IN_TWO_ORDERS], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.startswith("[] "), done.stdout + done.stderr


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
