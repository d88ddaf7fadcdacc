"""A cache of compiled kernels that moves from where it was built to a server without a compiler, and is final.

Triton keeps what it compiled under keys of its source, constants, types and own version, in folders that name
their own place. Here a cache is a folder with a manifest, which names every file by its digest; Triton is told to
look through these files, wherever they lie, and to take from them the C modules that it would have `gcc` build.

    manifest.json           made_for, kernels, and the digest and size of every file
    kernels/KEY/NAME.cubin  machine code, and NAME.json, what Triton wants to know of it
    libraries/SHA256/X.so   a C module, by the digest of its source

A process opens caches with `activate`, starts every kernel that it will ever start once, and then calls `seal`:
from then on a kernel that is in none of them is an error, KERNEL_NOT_COMPILED, not seconds of compiling while a
request waits.

Source: Triton's `runtime/cache.py`, `runtime/build.py` and `knobs.py`, 3.6 to 3.9.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
KERNELS, LIBRARIES = "kernels", "libraries"
_FOLDERS = ((KERNELS,), (LIBRARIES,))
_FORMAT = 1
_CUDA = "libcuda.so.1"
_OWN = "cl-triton-"
_ALIKE = "_cloister_keys_alike"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


class CacheError(RuntimeError):
    """A cache cannot be used, or lacks something.

    Attributes:
        code: CACHE_UNREADABLE, CACHE_UNSAFE, CACHE_CHANGED, CACHE_MISMATCH, LIBRARY_NOT_BUILT or
            KERNEL_NOT_COMPILED.
        message: what is wrong, and what to do.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheError, (self.code, self.message)


class KernelNotCompiled(CacheError):  # noqa: N818  # a state of the cache
    """A kernel was started that is in no cache, once nothing may be compiled any more."""

    def __init__(self, message: str) -> None:
        super().__init__("KERNEL_NOT_COMPILED", message)


def made_for() -> dict[str, Any]:
    """What must be the same where a cache is built and where it is used; needs neither Triton nor torch loaded."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "format": _FORMAT,
        "triton": triton,
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "machine": platform.machine(),
    }


def installed_folder() -> Path:
    """Where `kernels.aot install` puts a cache: CLOISTER_TRITON_CACHE, or under the interpreter's prefix."""
    named = os.environ.get("CLOISTER_TRITON_CACHE")
    return Path(named) if named else Path(sysconfig.get_path("data")) / "share" / "cloister" / "triton"


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(folder: Path, kernels: Sequence[Mapping[str, Any]]) -> None:
    """Name every file of `folder` by its digest.

    Args:
        folder: with the folders of kernels and libraries.
        kernels: what was compiled, for people and for comparing.
    """
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, digest_of(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    content = {"made_for": made_for(), "kernels": kernels, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def check(folder: Path) -> dict[str, bytes]:
    """Every file of a cache by its name there, the manifest among them, once all is as it was built.

    Raises:
        CacheError: CACHE_UNREADABLE; CACHE_UNSAFE, others may write there; CACHE_CHANGED, a file is not what the
            manifest says; CACHE_MISMATCH, it was built for another Triton, Python or machine.
    """
    try:
        _check_owner(folder)
        content = {MANIFEST: _read(folder, MANIFEST)}
        for name in _manifest(content)["files"]:
            content[name] = _read(folder, name)
    except OSError as error:
        raise CacheError("CACHE_UNREADABLE", f"{error.filename or folder}: {error.strerror}") from error
    return check_content(content, str(folder))


def check_content(content: Mapping[str, bytes], place: str) -> dict[str, bytes]:
    """As `check`, of files that are in memory.

    Args:
        content: by name in the cache.
        place: where they come from, for errors.

    Raises:
        CacheError: CACHE_CHANGED or CACHE_MISMATCH.
    """
    manifest = _manifest(content)
    if manifest["made_for"] != made_for():
        raise CacheError(
            "CACHE_MISMATCH",
            f"{place} was built for {manifest['made_for']}, and this is {made_for()}: build it again with "
            "`python -m kernels.aot build` under the same versions",
        )
    for name, (size, digest) in manifest["files"].items():
        found = content.get(name, b"")
        if len(found) != size or hashlib.sha256(found).hexdigest() != digest:
            raise CacheError("CACHE_CHANGED", f"{place}: {name} is not the file that was built; install it again")
    return {name: content[name] for name in (MANIFEST, *manifest["files"])}


def _manifest(content: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(content[MANIFEST])
        _ = manifest["made_for"]
        names = [Path(name) for name, (_, _) in manifest["files"].items()]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError("CACHE_CHANGED", f"no {MANIFEST} as `python -m kernels.aot` writes it") from error
    if any(name.parts[:1] not in _FOLDERS or ".." in name.parts or "\0" in str(name) for name in names):
        raise CacheError("CACHE_CHANGED", f"{MANIFEST} names files outside the cache")
    return manifest


def _check_owner(folder: Path) -> None:
    """Nobody but root and this user can have put code here, or change it.

    Raises:
        CacheError: CACHE_UNSAFE.
        OSError: it cannot be looked at.
    """
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise CacheError("CACHE_UNSAFE", f"{path} is neither file nor folder")
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & _WRITABLE_BY_OTHERS:
            raise CacheError(
                "CACHE_UNSAFE",
                f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, and what lies "
                "there is executed: it must be root's or this user's, and writable by nobody else",
            )


def _read(folder: Path, name: str) -> bytes:
    with open(os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
        return file.read()


class KernelCache:
    """What Triton finds of compiled kernels in this process, and what it may add.

    Args:
        own: a folder of this process, where caches are unpacked, and for what is compiled here.
        may_compile: kernels that are in no cache are compiled, even once it is sealed.

    Attributes:
        hits: kernels that were found.
        misses: those that were compiled, in words.
    """

    def __init__(self, own: Path, may_compile: bool) -> None:
        self.hits = 0
        self.misses: list[str] = []
        self._own = own
        self._may_compile = may_compile
        self._sealed = False
        self._kernels: dict[str, dict[str, Path]] = {}
        self._libraries: dict[str, Path] = {}
        self._library_places: dict[str, Path] = {}
        self._starting = threading.local()
        self._counting = threading.Lock()

    def add(self, content: Mapping[str, bytes], folder: Path | None = None) -> None:
        """Take a cache that was checked.

        Args:
            content: its files.
            folder: where they lie; None: they are put into this process's own.
        """
        for name, data in content.items():
            path = (folder or self._own) / name
            if folder is None:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.write_bytes(data)
            kind, _, rest = name.partition("/")
            key, _, file = rest.partition("/")
            if kind == KERNELS:
                self._kernels.setdefault(key, {})[file] = path
            elif kind == LIBRARIES:
                self._libraries[key] = path
                self._library_places[hashlib.sha256(data).hexdigest()] = path

    def seal(self) -> None:
        """Every kernel was started once: one that is in no cache is an error from now on."""
        self._sealed = True
        log.info("kernels loaded", extra={"found": self.hits, "compiled": len(self.misses)})

    def kernel(self, key: str, name: str) -> dict[str, Path]:
        """The files of a kernel; none where it is to be compiled.

        Args:
            key: Triton's.
            name: of the kernel.

        Raises:
            KernelNotCompiled: it is in no cache, and the cache is sealed.
        """
        found = self._kernels.get(key, {})
        if f"{name}.json" not in found:
            self._missed(name)
            return {}
        with self._counting:
            self.hits += 1
        return found

    def own_file(self, key: str, name: str) -> Path:
        """Where this process keeps a file under a key."""
        return self._own / KERNELS / key / name

    def keep(self, key: str, name: str, data: bytes) -> Path:
        """Put a file under a key; a C module that lies in a cache stays there."""
        found = self._library_places.get(hashlib.sha256(data).hexdigest())
        if found is not None:
            return found
        path = self.own_file(key, name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
        unfinished.write_bytes(data)
        unfinished.replace(path)
        return path

    def complete(self, key: str, names: Iterable[str]) -> None:
        """All files of a kernel that was compiled here are kept."""
        self._kernels[key] = {name: self.own_file(key, name) for name in names}

    def library(self, name: str, source: str, folder: str, *places: list[str]) -> str:
        """A C module of Triton's: out of a cache, or built.

        Args:
            name: of the module.
            source: the file that it is built of.
            folder: where it may be built.
            places: folders of libraries and headers, and libraries.

        Raises:
            CacheError: LIBRARY_NOT_BUILT, it is in no cache, and there is no compiler or it may not be used.
        """
        digest = digest_of(Path(source))
        found = self._libraries.get(digest)
        if found is not None:
            return str(found)
        if self._sealed and not self._may_compile:
            raise CacheError("LIBRARY_NOT_BUILT", f"Triton's {name} is in no cache: {_WHAT_TO_DO}")
        return self._build(name, source, folder, *places)

    def _build(self, name: str, source: str, folder: str, *places: list[str]) -> str:
        from triton import knobs
        from triton.runtime import build

        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise CacheError(
                "LIBRARY_NOT_BUILT", f"Triton's {name} is in no cache, and here is no C compiler: {_WHAT_TO_DO}"
            )
        knobs.build.impl = None
        try:
            return str(build._build(name, source, folder, *places, []))
        finally:
            knobs.build.impl = self.library

    def notice(self, *, fn: Any, compile: Mapping[str, Any], **_: Any) -> None:  # noqa: A002  # Triton's name
        """What is about to be started for the first time; Triton's `jit_cache_hook`."""
        constants = {
            **compile["constants"],
            "num_warps": compile["num_warps"],
            "num_stages": compile["num_stages"],
        }
        names = list(compile["signature"])
        types = ", ".join(f"{at}: {kind}" for at, kind in compile["signature"].items() if kind != "constexpr")
        values = ", ".join(f"{_name(at, names)}={value}" for at, value in constants.items())
        self._starting.text = f"{fn.module}.{fn.name} of {types} with {values}"

    def _missed(self, name: str) -> None:
        what = getattr(self._starting, "text", name)
        if not self._sealed:
            self.misses.append(what)
            log.info("a kernel is compiled", extra={"kernel": what})
        elif self._may_compile:
            self.misses.append(what)
            log.warning("a kernel was in no cache and is compiled while a request waits", extra={"kernel": what})
        else:
            raise KernelNotCompiled(f"kernel {what} is in no cache: {_WHAT_TO_DO}")


_WHAT_TO_DO = (
    "load the deployment again, so that engine-prepare compiles for it, or install a cache that has it: "
    "`python -m kernels.aot build` on a machine with a compiler, `python -m kernels.aot install` here; see "
    "docs/gpu.md"
)


def _name(place: Any, names: Sequence[str]) -> str:
    """Of a constant: Triton has its place among the parameters, as a tuple."""
    if isinstance(place, tuple) and len(place) == 1 and isinstance(place[0], int):
        return names[place[0]]
    return str(place)


_active: KernelCache | None = None


class _Entry:
    """A key of the active cache, as Triton asks for it; see `triton.runtime.cache.CacheManager`."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        if _active is None:
            raise RuntimeError("no cache is active")
        self._cache = _active
        self._key = key

    def get_file(self, filename: str) -> str | None:
        """A file of this process's own."""
        path = self._cache.own_file(self._key, filename)
        return str(path) if path.is_file() else None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """All files of the kernel that NAME.json is of."""
        found = self._cache.kernel(self._key, filename.removesuffix(".json"))
        return {name: str(path) for name, path in found.items()} or None

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """Keep a file."""
        content = data if isinstance(data, bytes) else str(data).encode()
        return str(self._cache.keep(self._key, filename, content))

    def put_group(self, filename: str, group: Mapping[str, str]) -> None:
        """All files of a kernel are there."""
        self._cache.complete(self._key, group)


def activate(caches: Iterable[Mapping[str, bytes] | Path] = (), may_compile: bool = False) -> KernelCache:
    """Have Triton look through these caches, and nowhere else, in this process.

    Args:
        caches: folders, which are checked here, or the files of caches that were checked.
        may_compile: for developers: what is in none of them is compiled, even after `seal`.

    Raises:
        CacheError: as `check`.
    """
    cache = KernelCache(own_folder(), may_compile)
    for found in caches:
        cache.add(*((check(found), found) if isinstance(found, Path) else (found, None)))
    use(cache)
    return cache


def own_folder() -> Path:
    """A folder that is removed when this process ends, or by the next that wants one where it was killed.

    Raises:
        OSError: there is no room for one, or no place.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_OWN}*"):
        with contextlib.suppress(OSError):
            descriptor = _locked(left)
            try:
                shutil.rmtree(left)
            finally:
                os.close(descriptor)
    while True:
        own = Path(tempfile.mkdtemp(prefix=_OWN))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # a process that tidies up took it for left
            _locked(own)
            if own.exists():
                break
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _locked(folder: Path) -> int:
    """Hold the folder until this process ends, or closes the descriptor.

    Raises:
        OSError: another process does, or it is another user's.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "another user's", str(folder))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def use(cache: KernelCache) -> None:
    """Have Triton ask this cache."""
    global _active  # noqa: PLW0603  # Triton has one for a process
    from triton import knobs

    _active = cache
    key_alike()
    knobs.cache.manager_class = _Entry
    knobs.build.impl = cache.library
    knobs.runtime.jit_cache_hook = cache.notice
    if not knobs.nvidia.libcuda_path and (found := _libcuda()):
        knobs.nvidia.libcuda_path = found  # so that Triton need not run ldconfig


def key_alike() -> None:
    """Have a kernel's key follow from the kernel alone, whichever other one was started before it.

    Until 3.7 a key holds the constants of a function that the kernel calls only if that function has a key
    already: because another kernel calls it, too, and was started first. So functions get theirs before their
    constants are asked for, as from 3.9 on.
    """
    from triton.runtime.jit import DependenciesFinder

    if hasattr(DependenciesFinder, _ALIKE):
        return
    before = DependenciesFinder._update_hash

    def update_hash(self: Any, func: Any) -> Any:
        _ = func.cache_key
        return before(self, func)

    DependenciesFinder._update_hash = update_hash
    setattr(DependenciesFinder, _ALIKE, True)


def _libcuda() -> str | None:
    """The folder of the driver's library, where this process can load it."""
    try:
        ctypes.CDLL(_CUDA)
    except OSError:
        return None
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    paths = (Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if "/libcuda.so" in line)
    return next((str(path.parent) for path in paths if (path.parent / _CUDA).exists()), None)
