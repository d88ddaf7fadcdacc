"""`python -m kernels.aot`: kernels compiled ahead, for a GPU that is elsewhere, into a cache that moves there.

    build FOLDER --device "NVIDIA H200" --capability 9.0 [--launches FILE] [--libraries-only]
    install FOLDER [PLACE]
    check [PLACE]

`build` wants a C compiler and Python's headers, and neither a GPU nor its driver: the C modules through which
Triton talks to the driver are linked to a stand-in of the same name. It compiles the starts that FILE lists
(`python -m engine.prepare.kernels` makes such lists of deployments), or those of all families' cases, or, with
`--libraries-only`, nothing but the C modules: with them a server can compile kernels itself, as Triton's own
compiler comes with its package. `install` puts a cache where workers look for it, readable and no more.

Source: Triton 3.6 to 3.9, `backends/nvidia/driver.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.triton import cache
from kernels.triton.cache import CacheError, KernelCache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernels.triton.launch import Launch

_KEPT = (".cubin", ".json")
_UNFINISHED = ".making"
_READABLE, _FOLDER = 0o444, 0o555


class Builder(KernelCache):
    """A cache on its way, into which everything goes that Triton compiles.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, may_compile=True)
        self._folder = folder

    def kernel(self, key: str, name: str) -> dict[str, Path]:
        """The files of a kernel, in this cache, too."""
        found = super().kernel(key, name)
        return {
            file: self._copied(path, self._folder / cache.KERNELS / key / file) for file, path in found.items()
        }

    def library(self, name: str, source: str, folder: str, *places: list[str]) -> str:
        """Build a C module, unless that was done, and keep it under the digest of its source."""
        path = self._folder / cache.LIBRARIES / cache.digest_of(Path(source)) / f"{name}.so"
        return str(path if path.exists() else self._copied(super().library(name, source, folder, *places), path))

    def has_library(self, name: str, source: Path) -> bool:
        """Keep a C module that is known, without loading it."""
        if cache.digest_of(source) not in self._libraries:
            return False
        self.library(name, str(source), "")
        return True

    def _copied(self, file: Path | str, path: Path) -> Path:
        if Path(file) != path:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
            shutil.copyfile(file, unfinished)
            unfinished.replace(path)
        return path


def build(
    folder: Path,
    starts: Sequence[Launch],
    capability: int,
    known: Sequence[Path] = (),
    processes: int | None = None,
) -> int:
    """Fill `folder` with what `starts` need on a device of this capability; how many kernels that is.

    Args:
        folder: a new or empty one.
        starts: of kernels.
        capability: compute capability of the device, 90 for 9.0.
        known: caches, from which everything is taken that they have.
        processes: that compile side by side.

    Raises:
        CacheError: LIBRARY_NOT_BUILT; KERNEL_NOT_COMPILED, Triton refuses a kernel; as `check` of those known.
    """
    from kernels.triton.offline import key

    folder.mkdir(parents=True, exist_ok=True)
    unique = list({key(start): start for start in starts}.values())
    with _linkable():
        _prepare(folder, known)
        kernels = _compile_all(folder, unique, capability, processes or len(os.sched_getaffinity(0)))
    for path in folder.glob(f"{cache.KERNELS}/*/*"):
        if path.suffix not in _KEPT:
            path.unlink()
    for path in folder.glob(f"{cache.KERNELS}/*"):
        if not any(path.iterdir()):
            path.rmdir()
    cache.write_manifest(folder, kernels)
    return len(kernels)


def _prepare(folder: Path, known: Sequence[Path]) -> None:
    """Let Triton put everything into `folder`, and build the C module that every start needs."""
    from triton import knobs
    from triton.backends.nvidia import driver

    builder = Builder(folder)
    for place in known:
        builder.add(cache.check(place), place)
    cache.use(builder)
    knobs.compilation.store_binary_only = True
    if not builder.has_library("cuda_utils", Path(driver.__file__).with_name("driver.c")):
        driver.CudaUtils()


_asked: Sequence[Launch] = ()  # of this process and those forked from it: a start cannot be sent


def _compile_all(folder: Path, starts: Sequence[Launch], capability: int, processes: int) -> list[dict[str, Any]]:
    global _asked  # noqa: PLW0603  # see there
    _asked = starts
    from kernels.triton.offline import forked

    with forked(processes) as pool:
        return list(pool.map(_compile_one, range(len(starts)), [capability] * len(starts)))


def _compile_one(place: int, capability: int) -> dict[str, Any]:
    """Compile a start, and where this Triton has a C module for each signature, build that, too."""
    from triton.backends.nvidia import driver

    from kernels.triton.offline import compile_launch, name

    start = _asked[place]
    try:
        kernel = compile_launch(start, capability)
        if hasattr(driver, "make_launcher"):  # until 3.6
            driver.CudaLauncher(kernel.src, kernel.metadata)
    except CacheError as error:
        raise CacheError(error.code, error.message) from None
    except Exception as error:
        raise CacheError("KERNEL_NOT_COMPILED", f"{name(start)} for sm_{capability}: {error}"[:2000]) from None
    return {"kernel": name(start), "hash": kernel.hash, "target": capability,
            "constants": {at: str(value) for at, value in start.options.items()}}  # fmt: skip


@contextmanager
def _linkable() -> Iterator[None]:
    """There is a libcuda.so.1 to link with: the driver's, or one with its functions' names and nothing in them."""
    from triton import knobs

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        yield
        return
    before = knobs.nvidia.libcuda_path
    with tempfile.TemporaryDirectory(prefix="cl-libcuda-") as folder:
        knobs.nvidia.libcuda_path = folder
        library = Path(folder) / "libcuda.so.1"
        if shutil.which("gcc") or os.environ.get("CC"):
            _stand_in(Path(folder))
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        else:
            library.touch()  # Triton looks for it before it asks for C modules, which nothing can build here
        try:
            yield
        finally:
            knobs.nvidia.libcuda_path = before


def _stand_in(folder: Path) -> None:
    from triton.backends.nvidia import driver

    sources = Path(driver.__file__).parent.glob("driver.*")
    names = {found for path in sources for found in re.findall(r"\bcu[A-Z]\w+", path.read_text())}
    code = folder / "cuda.c"
    code.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    compiler = os.environ.get("CC", "gcc")
    library = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, code],
        check=True,
        capture_output=True,
    )


def install(source: Path, place: Path) -> int:
    """Put a cache where workers look for it; how many files it has.

    Args:
        source: a cache that was built.
        place: its folder; what is there is replaced.

    Raises:
        CacheError: as `check`, of the source.
        OSError: it cannot be written.
    """
    content = cache.check(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    for name, data in content.items():
        path = new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(_READABLE)
    for path in (*sorted(new.rglob("*")), new):
        if path.is_dir():
            path.chmod(_FOLDER)
    if place.exists():
        old = new.with_name(new.name + ".old")
        place.rename(old)
        new.rename(place)
        remove(old)
    else:
        new.rename(place)
    return len(content)


def remove(place: Path) -> None:
    """Remove an installed cache, whose folders nobody may write."""
    for path in (place, *place.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(place)


def main(words: list[str] | None = None) -> int:
    """Build, install or check a cache; the exit status."""
    args = _parser().parse_args(words)
    try:
        print(args.run(args))
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: CACHE_UNREADABLE: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("build", help="compile")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--device", default="", help="its name, which chooses the table of configurations")
    verb.add_argument("--capability", default="9.0", type=_capability, help="compute capability, 9.0 of an H200")
    verb.add_argument("--launches", type=Path, help="a list of starts")
    verb.add_argument("--libraries-only", action="store_true", help="no kernels")
    verb.add_argument("--only", default="", metavar="NAME", help="kernels whose name holds this")
    verb.set_defaults(run=_build)
    verb = verbs.add_parser("install", help="put a cache where workers look for it")
    verb.add_argument("folder", type=Path)
    verb.add_argument("place", type=Path, nargs="?", default=cache.installed_folder())
    verb.set_defaults(run=lambda args: f"{args.place}: {install(args.folder, args.place)} files installed")
    verb = verbs.add_parser("check", help="compare a cache with its manifest")
    verb.add_argument("place", type=Path, nargs="?", default=cache.installed_folder())
    verb.set_defaults(run=lambda args: f"{args.place}: {len(cache.check(args.place))} files as they were built")
    return parser


def _build(args: argparse.Namespace) -> str:
    from kernels.triton import configs, launch_list, offline
    from kernels.triton.case import MODEL

    if args.folder.exists() and any(args.folder.iterdir()):
        raise CacheError("CACHE_UNREADABLE", f"{args.folder} is not empty")
    configs.select(args.device, args.capability)
    if args.libraries_only:
        starts = []
    elif args.launches:
        starts = launch_list.from_json(json.loads(args.launches.read_text()))
    else:
        starts = offline.launches(MODEL, args.only)
    return f"{args.folder}: {build(args.folder, starts, args.capability)} kernels for sm_{args.capability}"


def _capability(text: str) -> int:
    major, _, minor = text.partition(".")
    return 10 * int(major) + int(minor or 0)


if __name__ == "__main__":
    sys.exit(main())
