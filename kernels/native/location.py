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
    """The file that CLOISTER_KERNELS_LIBRARY names, or else the installed one; None where there is none.

    One that was built from other sources than lie here is none.
    """
    path = Path(os.environ[_OVERRIDE]) if _is_named() else _installed(LIBRARY)
    return path if path and path.is_file() and (_is_named() or _is_of_these_sources()) else None


def missing() -> str:
    """Why `find_library` finds none, and what to do."""
    if _is_named():
        return f"{_OVERRIDE} names {os.environ[_OVERRIDE]}, which is no file"
    found = statement()
    if found.startswith("built"):
        found = "built from other sources than lie here" if _installed(LIBRARY) else f"{found}, and gone"
        return f"{found}: run ./install.sh again"
    return f"{found}; with GCC 11 or newer, ./install.sh builds it"


def statement() -> str:
    """What the installation says became of the library, as CMakeLists.txt wrote it."""
    return _stated()[0]


def sources(folder: Path = _HERE) -> str | None:
    """SHA-256, in hex, of the list of the C++ sources in a folder, as sha256sum writes it; None where none are."""
    files = [
        path.relative_to(folder).as_posix() for ending in ("h", "cpp") for path in folder.glob(f"*/*.{ending}")
    ]
    lines = (f"{hashlib.sha256((folder / file).read_bytes()).hexdigest()}  {file}\n" for file in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest() if files else None


def _is_named() -> bool:
    return bool(os.environ.get(_OVERRIDE))


def _is_of_these_sources() -> bool:
    """Where they lie here, as in a checkout."""
    return sources() in (None, _stated()[1])


def _stated() -> tuple[str, str]:
    """What became of the library, and the digest of its sources."""
    path = _installed(_STATEMENT)
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    text, digest = (*lines, "", "")[:2]
    return text or "not built: not installed", digest


def _installed(name: str) -> Path | None:
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)
