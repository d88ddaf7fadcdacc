"""The native library is built where there is a compiler, left out where there is none, never half of either."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from kernels.native import location
from kernels.native.library import load

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PACKAGES = ("admin_tui", "appliance", "bundles", "engine", "kernels")
_SANITIZED = "address,undefined"


def configure(
    build: Path, *options: str, compiler: str = "", state: str = "wheel"
) -> "subprocess.CompletedProcess[str]":
    """What CMake says to the sources; with another compiler than the one there is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_KERNELS")}
    if compiler:
        environment["CXX"] = compiler
    command = (
        BIN / "cmake",
        "-S",
        ROOT / "kernels" / "native",
        "-B",
        build,
        "-G",
        "Ninja",
        f"-DSKBUILD_STATE={state}",
    )
    ninja = f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}"
    return subprocess.run(
        [*command, ninja, *options], env=environment, capture_output=True, text=True, check=False
    )


def run(*command: "str | Path", **environment: str) -> "subprocess.CompletedProcess[str]":
    """A program that must succeed; its output is shown if it does not."""
    done = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done


def wheel(folder: Path, build: Path, **environment: str) -> Path:
    """The wheel of this checkout, as pip would have it made."""
    make = f"build_wheel({str(folder)!r}, {{'build-dir': {str(build)!r}}})"
    run(sys.executable, "-c", f"from scikit_build_core.build import build_wheel; {make}", **environment)
    return next(folder.glob("*.whl"))


def tracked(*paths: str) -> set[str]:
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths).stdout.split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_where_there_is_a_compiler_the_library_is_there_and_loads() -> None:
    library = load()  # what keeps it from loading is raised
    assert "portable" in library.isas


def test_without_a_compiler_it_installs_without_a_library_and_says_so(tmp_path: Path) -> None:
    done = configure(tmp_path / "b", compiler="/nowhere/g++")
    assert done.returncode == 0, done.stderr
    assert "native kernels: not built: no C++ compiler" in done.stdout
    run(BIN / "cmake", "--install", tmp_path / "b", "--prefix", tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").rglob("*") if path.is_file()] == ["kernels.txt"]


def test_where_a_library_is_asked_for_a_missing_compiler_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path / "b", "-DCLOISTER_KERNELS=ON", compiler="/nowhere/g++")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr


def test_a_compiler_that_does_not_work_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path / "b", compiler=shutil.which("false") or "")
    assert done.returncode != 0
    assert "not able to compile" in " ".join(done.stderr.split())


def test_an_editable_installation_names_the_checkout_and_hooks_no_import(tmp_path: Path) -> None:
    assert configure(tmp_path / "b", "-DCLOISTER_KERNELS=OFF", state="editable").returncode == 0
    run(BIN / "cmake", "--install", tmp_path / "b", "--prefix", tmp_path / "p")
    assert (tmp_path / "p" / "cloister.pth").read_text() == f"{ROOT}\n"
    assert (tmp_path / "p" / "cloister.libs" / "kernels.txt").read_text().startswith("not built: switched off\n")


def test_a_wheel_has_every_module_proto_and_marker_and_no_source_of_the_library(tmp_path: Path) -> None:
    made = wheel(tmp_path, tmp_path / "b", CLOISTER_KERNELS="OFF")
    names = {name for name in zipfile.ZipFile(made).namelist() if name.startswith(PACKAGES)}
    native = "kernels/native/"
    sources = {name for name in tracked(native) if name.endswith(("CMakeLists.txt", ".h", ".cpp"))}
    assert len(sources) > 10
    assert names == tracked(*PACKAGES) - sources


def test_a_library_of_other_sources_than_lie_here_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (location.LIBRARY, "kernels.txt"):
        (tmp_path / name).write_text("built for portable\nsome digest\n")
    monkeypatch.delenv("CLOISTER_KERNELS_LIBRARY", raising=False)
    monkeypatch.setattr(location, "_installed", tmp_path.joinpath)
    assert location.find_library() is None
    assert location.missing() == "built from other sources than lie here: run ./install.sh again"
    (tmp_path / "kernels.txt").write_text(f"built for portable\n{location.sources()}\n")
    assert location.find_library() == tmp_path / location.LIBRARY
    monkeypatch.setattr(location, "sources", lambda: None)  # as in a wheel
    (tmp_path / "kernels.txt").write_text("built for portable\n\n")
    assert location.find_library() == tmp_path / location.LIBRARY


def test_sources_are_told_apart_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    assert location.sources(tmp_path) is None
    digests = []
    for name, text in (("a.h", "x"), ("a.h", "y"), ("b.cpp", "x")):
        (tmp_path / "src" / name).write_text(text)
        digests.append(location.sources(tmp_path))
    assert len(set(digests)) == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_wheel_has_the_library_and_serves_where_it_is_installed(tmp_path: Path) -> None:
    made = wheel(tmp_path, tmp_path / "b", CLOISTER_KERNELS="ON", CLOISTER_KERNELS_STRICT="ON")
    assert "-py3-none-" in made.name
    names = zipfile.ZipFile(made).namelist()
    assert f"cloister.libs/{location.LIBRARY}" in names
    place = tmp_path / "place"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, made)
    program = "from kernels.native.library import load; print(load().path, load().isa)"
    found = subprocess.run(
        (sys.executable, "-P", "-c", program),
        env={**os.environ, "PYTHONPATH": str(place)}, cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert found.startswith(f"{place}/cloister.libs/")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_the_kernels_touch_no_memory_but_their_own_and_do_nothing_undefined(tmp_path: Path) -> None:
    done = configure(tmp_path / "b", f"-DCLOISTER_KERNELS_SANITIZE={_SANITIZED}", "-DCLOISTER_KERNELS=ON")
    assert done.returncode == 0, done.stderr
    run(BIN / "cmake", "--build", tmp_path / "b")
    found: Sequence[str] = [
        run("g++", f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libubsan.so")
    ]
    tests = [
        str(path)
        for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
        if path.name != Path(__file__).name
    ]
    run(
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests),
        LD_PRELOAD=" ".join(found),
        ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        CLOISTER_KERNELS_LIBRARY=str(tmp_path / "b" / location.LIBRARY),
    )
