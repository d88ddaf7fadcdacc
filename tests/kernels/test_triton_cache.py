"""What Triton finds of a cache of compiled kernels, and where a process keeps what it compiles itself."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kernels.triton import cache as kernel_cache
from kernels.triton.cache import CacheError, KernelCache, _Entry, activate, check, write_manifest


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for temporary files; this process's Triton is told of no cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "use", lambda cache: None)
    return tmp_path


def test_what_is_compiled_here_is_found_again_and_lies_in_a_folder_of_the_process_alone(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = activate()
    monkeypatch.setattr(kernel_cache, "_active", cache)
    entry = _Entry("KEY")
    assert entry.get_group("_add.json") is None
    group = {name: entry.put(data, name) for name, data in (("_add.cubin", b"code"), ("_add.json", "{}"))}
    entry.put_group("_add.json", group)
    assert _Entry("KEY").get_group("_add.json") == group
    assert (cache.hits, cache.misses) == (1, ["_add"])
    (own,) = temporary.iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    assert all(Path(path).is_relative_to(own) for path in group.values())


def test_what_a_killed_process_left_goes_with_the_next_and_a_living_ones_stays(temporary: Path) -> None:
    code = (
        "import os, signal, sys, tempfile; from kernels.triton import cache; cache.use = lambda found: None;"
        "tempfile.tempdir = sys.argv[1]; cache.activate(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(temporary)], cwd=Path(__file__).parents[2], check=False)
    (left,) = temporary.iterdir()
    activate()
    (living,) = temporary.iterdir()
    assert living != left
    activate()
    assert living in temporary.iterdir()
    assert len(list(temporary.iterdir())) == 2


def test_a_folder_that_another_process_takes_for_left_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def made_and_taken(prefix: str) -> str:
        folder = temporary / f"{prefix}{len(made)}"
        folder.mkdir()
        made.append(folder)
        if len(made) == 1:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
        if len(made) == 2:
            folder.rmdir()
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", made_and_taken)
    assert kernel_cache.own_folder() == made[2]


@pytest.mark.parametrize(
    "changed",
    [
        {"files": {"kernels/x": 1}},
        {"files": []},
        {"files": {".": [0, ""]}},
        {"files": {"kernels/\0": [0, ""]}},
        None,
    ],
    ids=str,
)
def test_a_manifest_in_another_form_is_refused(changed: dict[str, Any] | None, tmp_path: Path) -> None:
    write_manifest(tmp_path, [])
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | (changed or {})
    if changed is None:
        del manifest["made_for"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="CACHE_CHANGED"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["../kernels/x", "/etc/passwd", "other/KEY/x.cubin", "kernels/../../x"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, [])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"] = {name: [0, ""]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"CACHE_CHANGED: .*outside"):
        check(tmp_path)


def test_a_link_in_a_cache_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, [])
    (tmp_path / "kernels").symlink_to("/tmp")
    with pytest.raises(CacheError, match="CACHE_UNSAFE"):
        check(tmp_path)


def test_a_c_module_comes_from_the_cache_by_the_digest_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = tmp_path / "driver.c", tmp_path / "other.c"
    source.write_text("int one;")
    other.write_text("int two;")
    name = f"libraries/{kernel_cache.digest_of(source)}/cuda_utils.so"
    cache = KernelCache(tmp_path / "own", may_compile=False)
    cache.add({name: b"library"})
    found = Path(cache.library("cuda_utils", str(source), "", [], [], []))
    assert found.read_bytes() == b"library"
    assert cache.keep("KEY", "cuda_utils.so", b"library") == found  # where Triton would put a copy
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(
        CacheError, match="LIBRARY_NOT_BUILT: Triton's cuda_utils is in no cache, and here is no C"
    ):
        cache.library("cuda_utils", str(other), "", [], [], [])
