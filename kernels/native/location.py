"""Where the library of CPU kernels lies, if it was built; needs no torch and loads nothing.

An editable install keeps the library away from the sources, in the site-packages that the package's path names,
too.
"""

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import kernels.native

LIBRARY = "libcloister_kernels.so"
_OVERRIDE = "CLOISTER_KERNELS_LIBRARY"
_DISTRIBUTION = "cloister"


def find_library() -> Path | None:
    """The file that CLOISTER_KERNELS_LIBRARY names, or else the installed one; None where there is none."""
    named = os.environ.get(_OVERRIDE)
    candidates = iter([Path(named)]) if named else _candidates()
    return next((path for path in candidates if path.is_file()), None)


def missing() -> str:
    """Why `find_library` finds none, and what to do."""
    named = os.environ.get(_OVERRIDE)
    if named:
        return f"{_OVERRIDE} names {named}, which is no file"
    return f"{LIBRARY} is not installed: install with a C++ compiler and CMake on the machine, or a release wheel"


def _candidates() -> Iterator[Path]:
    for folder in kernels.native.__path__:
        yield Path(folder, LIBRARY)
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == LIBRARY:
            yield Path(str(file.locate()))
