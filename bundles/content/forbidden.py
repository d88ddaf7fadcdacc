"""What may be in a model folder at all: a list of allowed kinds, recognised by name, beginning and end.

Nothing is scanned for malice: a format that can carry code or other files is refused whole, whatever it is called,
and so is a file that is two things at once (an archive reader looks at the end, tar at byte 257).

Source: PKWARE APPNOTE 6.3.10, sections 4.3.12 to 4.3.16; POSIX.1-2017, "ustar Interchange Format"; the pickle
opcodes of CPython's pickletools.
"""

import pickletools
import re
import struct
from collections.abc import Callable, Iterable

from bundles.format.errors import BundleError

HEAD_BYTES = 512
"""Bytes of a file's beginning that tell its kind."""

TAIL_BYTES = 22 + 65535
"""Bytes of a file's end in which a zip reader looks for an archive's directory."""

_PICKLES = re.compile(r"\.(?:bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz|h5|keras|msgpack|onnx|pb|tflite)$", re.I)
_CODE = re.compile(
    r"\.(?:py|pyc|pyd|pyx|so(?:\.\d+)*|dll|dylib|exe|com|scr|bat|cmd|ps1|vbs|sh|bash|js|mjs|wasm|ptx|cubin|cu|cpp|c"
    r"|jar|rb|lua|pl)$",
    re.I,
)
_ARCHIVES = re.compile(r"\.(?:zip|tar|tgz|gz|bz2|xz|zst|7z|rar|whl|egg|nemo|mar)$", re.I)
_ALLOWED = re.compile(
    r"\.(?:safetensors|json|jinja|txt|md|model)$|^(?:licen[cs]e|notice|copying|readme)[^/]*$", re.I
)
_BY_NAME = (
    (_PICKLES, "CONTENT_PICKLE", "is of a kind that can carry code; convert to safetensors"),
    (_CODE, "CONTENT_CODE", "is a program; a model is data only"),
    (_ARCHIVES, "CONTENT_ARCHIVE", "is an archive; unpack it"),
    (re.compile(r"\.gguf$", re.I), "CONTENT_GGUF", "is a GGUF file; name it with --model to convert it"),
)
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "CONTENT_PICKLE", "a zip archive, as torch.save writes"),
    (b"PK\x05\x06", "CONTENT_PICKLE", "a zip archive"),
    (b"PK\x07\x08", "CONTENT_PICKLE", "a zip archive"),
    (b"\x93NUMPY", "CONTENT_PICKLE", "a numpy file"),
    (b"\x89HDF", "CONTENT_PICKLE", "an HDF5 file"),
    (b"\x1f\x8b", "CONTENT_ARCHIVE", "a gzip file"),
    (b"BZh", "CONTENT_ARCHIVE", "a bzip2 file"),
    (b"\xfd7zXZ", "CONTENT_ARCHIVE", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "CONTENT_ARCHIVE", "a zstd file"),
    (b"7z\xbc\xaf\x27\x1c", "CONTENT_ARCHIVE", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "CONTENT_ARCHIVE", "a RAR archive"),
    (b"GGUF", "CONTENT_GGUF", "a GGUF file"),
    (b"\x7fELF", "CONTENT_CODE", "an ELF program"),
    (b"MZ", "CONTENT_CODE", "a Windows program"),
    (b"\xcf\xfa\xed\xfe", "CONTENT_CODE", "a Mach-O program"),
    (b"\xca\xfe\xba\xbe", "CONTENT_CODE", "a Java class or Mach-O program"),
    (b"\0asm", "CONTENT_CODE", "a WebAssembly program"),
    (b"#!", "CONTENT_CODE", "a script"),
)
_PICKLE_MAGIC = re.compile(rb"\x80[\x00-\x05](?:[\x95}\]()c\x8ax\x8c\x80.KMNX])", re.DOTALL)
_PICKLE_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"})
_PICKLE_LOOK = 64 * 1024
_TAR_MAGIC, _TAR_AT = b"ustar", 257
_ZIP_END, _ZIP64_LOCATOR, _ZIP_ENTRY = b"PK\x05\x06", b"PK\x06\x07", b"PK\x01\x02"
_ZIP_END_SIZE, _ZIP64_LOCATOR_SIZE = 22, 20
_ZIP_LEAST_ENTRY = 46
_MOST_ZIP_ENDS = 8  # random weights have none; each is looked behind, which may take reading a chunk again

Read = Callable[[int, int], bytes]
"""The bytes of a file at an offset, of a length."""


def check_names(paths: Iterable[str]) -> None:
    """Refuse files by their names, before any byte of them is read.

    Raises:
        BundleError: CONTENT_PICKLE, CONTENT_CODE, CONTENT_ARCHIVE, CONTENT_GGUF, CONTENT_TYPE.
    """
    for path in paths:
        name = path.rpartition("/")[2]
        for pattern, code, reason in _BY_NAME:
            if pattern.search(name):
                raise BundleError(code, f"{path!a} {reason}")
        if not _ALLOWED.search(name):
            raise BundleError("CONTENT_TYPE", f"{path!a} is of no kind that a bundle may hold")


def check_magic(path: str, first: bytes) -> None:
    """Refuse a file that begins like something else than its name says.

    Args:
        path: names the file in errors.
        first: its first `HEAD_BYTES` bytes, where it has them.

    Raises:
        BundleError: CONTENT_PICKLE, CONTENT_CODE, CONTENT_ARCHIVE, CONTENT_GGUF.
    """
    if first[_TAR_AT : _TAR_AT + len(_TAR_MAGIC)] == _TAR_MAGIC:
        raise BundleError("CONTENT_ARCHIVE", f"{path!a} is a tar archive as well")
    # The first bytes of safetensors are a length and may be anything; the header's own check follows. With a
    # length that the check accepts, the fourth byte is zero, which no program and no pickle has there.
    if path.lower().endswith(".safetensors") and first[3:9] == b"\0\0\0\0\0{":
        return
    if _PICKLE_MAGIC.match(first):
        raise BundleError("CONTENT_PICKLE", f"{path!a} holds a pickle")
    for magic, code, what in _MAGIC:
        if first.startswith(magic):
            raise BundleError(code, f"{path!a} is {what}")


def check_not_pickled(path: str, content: bytes) -> None:
    """Refuse text that is a pickle of protocol 0 or 1, which has no magic, and that calls something.

    Args:
        path: names the file in errors.
        content: its beginning; no more than 64 KiB are looked at.

    Raises:
        BundleError: CONTENT_PICKLE.
    """
    calls = False
    try:
        for opcode, _, _ in pickletools.genops(content[:_PICKLE_LOOK]):
            calls = calls or opcode.name in _PICKLE_CALLS
    except (ValueError, IndexError, OverflowError, struct.error):
        return  # no pickle: it stops making sense before it ends
    if calls:
        raise BundleError("CONTENT_PICKLE", f"{path!a} is a pickle that names code to run")


def check_end(path: str, size: int, read: Read) -> None:
    """Refuse a file that a zip reader would open, though it begins as something else.

    Of weights a stray signature among random numbers is no archive: an entry must be where the end says. Many of
    them are none by chance.

    Raises:
        BundleError: CONTENT_ARCHIVE.
    """
    start = max(0, size - TAIL_BYTES)
    tail = read(start, size - start)
    found = tail.rfind(_ZIP_END)
    of_weights = path.lower().endswith(".safetensors")
    too_many = tail.count(_ZIP_END) > _MOST_ZIP_ENDS
    while found >= 0:
        if too_many or not of_weights or _is_archive_end(tail, found, start, read):
            raise BundleError("CONTENT_ARCHIVE", f"{path!a} is a zip archive as well: it ends like one")
        found = tail.rfind(_ZIP_END, 0, found)


def _is_archive_end(tail: bytes, found: int, start: int, read: Read) -> bool:
    """Whether the signature at `found` is the end of an archive that readers of either habit would take.

    Some take the directory's place from its offset, some from its size before the end; an empty archive has none.
    """
    record = tail[found : found + _ZIP_END_SIZE]
    if len(record) < _ZIP_END_SIZE:
        return False
    position = start + found
    if position >= _ZIP64_LOCATOR_SIZE and read(position - _ZIP64_LOCATOR_SIZE, 4) == _ZIP64_LOCATOR:
        return True
    entries, length, offset, comment = struct.unpack("<10xHIIH", record)
    if not entries and not length:
        return bool(found + _ZIP_END_SIZE + comment == len(tail))
    places = [place for place in (position - length, offset) if 0 <= place <= position - _ZIP_LEAST_ENTRY]
    return _ZIP_ENTRY in [read(place, len(_ZIP_ENTRY)) for place in places]
