"""Where the library of CPU kernels lies if it was built, and from which sources; needs no torch, loads nothing.

An installation keeps it beside the packages, not in them: with an editable one these are elsewhere. So the
distribution's own record of its files says where it is.
"""

import hashlib
import os
from importlib import metadata
from pathlib import Path

LIBRARY = "libcloister_kernels.so"
_STATEMENT = "kernels.txt"
_OVERRIDE = "CLOISTER_KERNELS_LIBRARY"
_DISTRIBUTION = "cloister"
_HERE = Path(__file__).parent


def find_library() -> Path | None:
    """The file that CLOISTER_KERNELS_LIBRARY names, or else the installed one; None where there is none."""
    named = os.environ.get(_OVERRIDE)
    path = Path(named) if named else _installed(LIBRARY)
    return path if path and path.is_file() else None


def is_named() -> bool:
    """Whether CLOISTER_KERNELS_LIBRARY names the library, as those do who build one to try it."""
    return bool(os.environ.get(_OVERRIDE))


def missing() -> str:
    """Why `find_library` finds none, and what to do."""
    if is_named():
        return f"{_OVERRIDE} names {os.environ[_OVERRIDE]}, which is no file"
    return f"{statement()}; with GCC 11 or newer, ./install.sh builds it"


def statement() -> str:
    """What the installation says became of the library, as CMakeLists.txt wrote it."""
    path = _installed(_STATEMENT)
    return path.read_text(encoding="utf-8").strip() if path and path.is_file() else "not built: not installed"


def sources(folder: Path = _HERE) -> str | None:
    """SHA-256, in hex, of the list of the C++ sources in a folder, as sha256sum writes it; None where none are."""
    files = [
        path.relative_to(folder).as_posix() for ending in ("h", "cpp") for path in folder.glob(f"*/*.{ending}")
    ]
    lines = (f"{hashlib.sha256((folder / file).read_bytes()).hexdigest()}  {file}\n" for file in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest() if files else None


def _installed(name: str) -> Path | None:
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)
