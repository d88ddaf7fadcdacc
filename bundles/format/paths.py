"""Which relative paths a model folder may have: those that name one file on every file system and nothing else.

Source: research on archive traversal (CPython tarfile CVEs of 2025 and 2026); Unicode TR36 (bidirectional
controls) and UAX 15 (stability of normal forms); Microsoft, "Naming Files, Paths, and Namespaces" (device names).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable

from bundles.format.errors import BundleError

MAX_COMPONENT = 255
MAX_PATH = 1024
# Control, format (bidirectional, invisible), unassigned (no stable normal form), private, line, paragraph.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cn", "Co", "Zl", "Zp"})
_RESERVED = frozenset('<>"|?*')
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(?:\..*)?", re.IGNORECASE)


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _has_control(path: str) -> bool:
    """Whether a character is one that cannot be seen; what Python calls printable has none, and is most paths."""
    return not path.isprintable() and any(unicodedata.category(character) in _UNPRINTABLE for character in path)


# Asked in this order, of the whole path; the first that holds is the refusal.
_PATH_RULES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("PATH_EMPTY", "is empty", lambda p: not p),
    ("PATH_ENCODING", "is not valid Unicode", lambda p: not p.isascii() and any(map(_is_surrogate, p))),
    ("PATH_CONTROL", "has a control, bidirectional or invisible character", _has_control),
    ("PATH_ABSOLUTE", "is absolute", lambda p: p.startswith("/")),
    ("PATH_BACKSLASH", "has a backslash or a colon", lambda p: "\\" in p or ":" in p),
    ("PATH_RESERVED", "has a character that Windows reserves", lambda p: not _RESERVED.isdisjoint(p)),
    ("PATH_NOT_NFC", "is not in Unicode form NFC", lambda p: not unicodedata.is_normalized("NFC", p)),
    ("PATH_TOO_LONG", f"is longer than {MAX_PATH} bytes", lambda p: len(p.encode()) > MAX_PATH),
)
# And of each component.
_COMPONENT_RULES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("PATH_TRAVERSAL", "has '..'", lambda c: c == ".."),
    ("PATH_EMPTY_COMPONENT", "has an empty or '.' component", lambda c: c in ("", ".")),
    ("PATH_TOO_LONG", f"has a component over {MAX_COMPONENT} bytes", lambda c: len(c.encode()) > MAX_COMPONENT),
    ("PATH_HIDDEN", "has a hidden file or folder", lambda c: c.startswith(".")),
    ("PATH_TRAILING", "has a component that ends with a dot or a space", lambda c: c[-1] in ". "),
    ("PATH_DEVICE_NAME", "has a name that Windows reserves", lambda c: bool(_DEVICE.fullmatch(c))),
)


def check_path(path: str) -> None:
    """Refuse a path that could name anything but one plain file below the model's folder.

    Raises:
        BundleError: PATH_EMPTY, PATH_ENCODING, PATH_CONTROL, PATH_ABSOLUTE, PATH_BACKSLASH, PATH_RESERVED,
            PATH_NOT_NFC, PATH_TOO_LONG, PATH_TRAVERSAL, PATH_EMPTY_COMPONENT, PATH_HIDDEN, PATH_TRAILING or
            PATH_DEVICE_NAME.
    """
    for code, reason, broken in _PATH_RULES:
        if broken(path):
            raise BundleError(code, f"the path {path!a} {reason}")
    for component in path.split("/"):
        for code, reason, broken in _COMPONENT_RULES:
            if broken(component):
                raise BundleError(code, f"the path {path!a} {reason}")


def check_paths(paths: Iterable[str]) -> None:
    """Refuse paths that are bad alone (`check_path`) or together.

    Raises:
        BundleError: as `check_path`, or PATH_DUPLICATE, PATH_NORMAL_COLLISION and PATH_CASE_COLLISION (two names
            that a file system which normalises Unicode, or knows no case, would merge), PATH_PREFIX (one is a file
            and a folder).
    """
    listed = tuple(paths)
    seen: dict[str, str] = {}
    for path in listed:
        if len(path) > MAX_PATH:  # normalising it could take long
            check_path(path)
        folded = _fold(path)
        if folded in seen:
            raise BundleError(_collision(seen[folded], path), f"the path {path!a} collides with {seen[folded]!a}")
        seen[folded] = path
    for path in listed:
        check_path(path)
    # Only now: a path that was checked is short, and its folders are few.
    folders = {"/".join(parts[:i]) for parts in (f.split("/") for f in seen) for i in range(1, len(parts))}
    both = sorted(folders & seen.keys())
    if both:
        raise BundleError("PATH_PREFIX", f"the path {seen[both[0]]!a} is a file and a folder")


def _collision(one: str, other: str) -> str:
    if one == other:
        return "PATH_DUPLICATE"
    normal = unicodedata.normalize("NFKC", one) == unicodedata.normalize("NFKC", other)
    return "PATH_NORMAL_COLLISION" if normal else "PATH_CASE_COLLISION"


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", path).casefold())
