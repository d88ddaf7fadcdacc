"""Kernels compiled for a deployment as a derived file: its cache goes the way of packed weights.

The file has every file of a cache of `kernels.triton.cache`. A worker reads it once, hashes these very bytes, and
unpacks them into a folder of its own, as Triton and the dynamic linker want paths. Nothing depends on the file:
what is missing or is not what was put on record is compiled again while the worker warms up, as Triton's own
compiler comes with its package; only C modules need a cache that was installed, or a C compiler.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from tempfile import gettempdir

import torch

from engine.derived.files import read_derived, writing
from engine.derived.layout import sources
from engine.derived.loading import Refused
from engine.derived.location import Derived, Location
from engine.errors import EngineError
from kernels.triton.cache import CacheError, KernelCache, activate, check, check_content, installed_folder

ALLOW_COMPILE = "CLOISTER_ALLOW_COMPILE"
"""Set to 1, a worker compiles a kernel that is in no cache, with a warning, though a request waits."""

log = logging.getLogger(__name__)


def keep_kernels(cache: Path, folder: Path, model_digest: str, layout: str) -> Derived:
    """Make the derived file of a cache that was built.

    Args:
        cache: its folder.
        folder: where the file goes.
        model_digest: of the deployment's model.
        layout: see `engine.derived.layout.kernels_layout_name`.

    Raises:
        EngineError: the cache is not as it was built.
        OSError: the file cannot be written.
    """
    try:
        content = check(cache)
    except CacheError as error:
        raise EngineError(error.code, error.message) from error
    with writing(folder / Derived(model_digest, layout, "", 0).name) as writer:
        files = {
            name: writer.put(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            for name, data in content.items()
        }
        sha256, size = writer.finish({"made_for": _made_for(model_digest, layout), "kernels": files})
    return Derived(model_digest, layout, sha256, size)


def open_kernels(location: Location | None, refused: Refused | None = None) -> KernelCache:
    """Have Triton look for kernels in the derived file, or else in the installed cache, where there is either.

    Args:
        location: of the derived file, if there is one on record.
        refused: told why that was not used; DERIVED_MISSING, DERIVED_CHANGED or DERIVED_MISMATCH.

    Raises:
        EngineError: the installed cache cannot be used, with a code of `CacheError`; KERNELS_NOT_UNPACKED, the
            folder for temporary files does not take them.
    """
    content, may_compile = _read(location, refused), os.environ.get(ALLOW_COMPILE, "") not in ("", "0")
    installed = installed_folder()
    try:
        if content is not None:
            return activate([content], may_compile)
        return activate([installed] if installed.is_dir() else [], may_compile)
    except CacheError as error:
        raise EngineError(error.code, error.message) from error
    except OSError as error:
        raise EngineError("KERNELS_NOT_UNPACKED", f"{gettempdir()}: {error.strerror}") from error


def _read(location: Location | None, refused: Refused | None) -> dict[str, bytes] | None:
    """The files of the cache in the derived file; None where it cannot be used."""
    if location is None:
        return None
    try:
        return _content(location)
    except EngineError as error:
        log.warning("derived file not used", extra={"code": error.code, "reason": error.message})
        if refused is not None:
            refused(error)
    return None


def _content(location: Location) -> dict[str, bytes]:
    """The files of the cache.

    Raises:
        EngineError: DERIVED_MISSING, DERIVED_CHANGED or DERIVED_MISMATCH.
    """
    derived, found = location.derived, read_derived(location)
    made, own = found.about.get("made_for"), _made_for(derived.model_digest, derived.layout)
    if made != own:
        raise EngineError("DERIVED_MISMATCH", f"the derived file was made for {made}, and this is {own}")
    try:
        content = {name: bytes(found.tensors[place].numpy()) for name, place in found.about["kernels"].items()}
        return check_content(content, str(location.path))
    except CacheError as error:
        raise EngineError("DERIVED_MISMATCH", error.message) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise EngineError("DERIVED_MISMATCH", "the derived file is not as this program makes them") from error


def _made_for(model_digest: str, layout: str) -> dict[str, str]:
    """All that must be the same where a file is used, beside what a cache says of itself."""
    return {"model": model_digest, "layout": layout, "sources": sources()}
