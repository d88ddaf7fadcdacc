"""Whether the small files of a model are what their names say: text, configuration, tables of a tokenizer.

Source: sentencepiece_model.proto (the fields of ModelProto); tiktoken's file of ranks.
"""

import codecs
import re
from typing import NamedTuple

from bundles.content import forbidden
from bundles.content.files import ModelFiles
from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import role_of

MAX_TEXT = 256 * 1024 * 1024
MAX_TABLE = 64 * 1024 * 1024  # of engine-inspect, too
MAX_CONFIG = 16 * 1024 * 1024
MAX_INDEX = 32 * 1024 * 1024  # of weights
_MAX_CONTAINERS = 500_000
_BLOCK = 1024 * 1024
# Tables, not configuration: engine-inspect parses the one that is used, under limits.
_TABLES = frozenset({"tokenizer.json", "vocab.json"})
# Always a request for code; with false, and of the second kind also with null, none.
_CODE_KEYS = {"auto_map": (), "trust_remote_code": (False,), "custom_pipelines": (False,)}
_CODE_KEYS_OR_NULL = {"auto_mapping": (False, None), "custom_generate": (False, None)}
_RANKS = re.compile(rb"(?:[A-Za-z0-9+/]+={0,2} [0-9]{1,8}\r?\n)+")
_PIECES = frozenset({1, 2, 3, 4, 5})  # pieces, trainer, normaliser, self test, denormaliser
_BYTES_FIELD = 2


def check_small(files: ModelFiles, path: str) -> None:
    """Refuse a file that is neither weights nor their index and not what its name says.

    Raises:
        BundleError: CONTENT_TEXT, CONTENT_TOO_LARGE, CONTENT_TYPE, CONTENT_PICKLE, CONTENT_REMOTE_CODE, or a JSON
            code.
    """
    name = path.rpartition("/")[2].lower()
    if name.endswith(".model"):
        _check_pieces(path, content(files, path))
    elif name.endswith(".json") and name not in _TABLES:
        _check_config(path, content(files, path))
    else:
        _check_text(files, path)
        forbidden.check_not_pickled(path, files.read(path, 0, _BLOCK))


def content(files: ModelFiles, path: str) -> bytes:
    """A whole file; `check_size` was asked before."""
    return files.read(path, 0, files.sizes[path])


def check_size(path: str, size: int) -> None:
    """Refuse a file that is larger than one of its name may be; of weights any size will do.

    Raises:
        BundleError: CONTENT_TOO_LARGE.
    """
    name = path.rpartition("/")[2].lower()
    limit = MAX_TEXT
    if role_of(path) == "weights":
        return
    if role_of(path) == "weights-index":
        limit = MAX_INDEX
    elif name.endswith(".model") or name in _TABLES:
        limit = MAX_TABLE
    elif name.endswith(".json"):
        limit = MAX_CONFIG
    if size > limit:
        raise BundleError(
            "CONTENT_TOO_LARGE", f"{path!a} has {size} bytes; {limit} are allowed in a file of its kind"
        )


def parse(raw: bytes, what: str, *, any_number: bool = False) -> object:
    """The value of a JSON document, which may not be made to take much more memory than its bytes.

    Raises:
        BundleError: CONTENT_TOO_LARGE, or a JSON code.
    """
    if raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS:
        raise BundleError("CONTENT_TOO_LARGE", f"{what} has over {_MAX_CONTAINERS} objects and lists")
    return strict_json.parse(raw, what, any_number=any_number)


def _check_text(files: ModelFiles, path: str) -> None:
    size = files.sizes[path]
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for offset in range(0, size, _BLOCK):
            if "\0" in decoder.decode(files.read(path, offset, _BLOCK)):
                raise BundleError("CONTENT_TEXT", f"{path!a} holds NUL characters")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise BundleError("CONTENT_TEXT", f"{path!a} is not UTF-8 text") from None


def _check_config(path: str, raw: bytes) -> None:
    """Refuse a configuration file that asks for code to be run."""
    if _names_code(parse(raw, path, any_number=True)):
        raise BundleError(
            "CONTENT_REMOTE_CODE", f"{path!a} asks for code from outside the engine (auto_map, trust_remote_code)"
        )


def _names_code(value: object) -> bool:
    if isinstance(value, dict):
        known = _CODE_KEYS | _CODE_KEYS_OR_NULL
        return any(
            key in known and not any(item is no for no in known[key]) for key, item in value.items()
        ) or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))


def _check_pieces(path: str, raw: bytes) -> None:
    """Refuse a `.model` that is not, from first byte to last, a SentencePiece model or a file of ranks."""
    if _RANKS.fullmatch(raw) is None and not _is_sentencepiece(raw):
        raise BundleError("CONTENT_TYPE", f"{path!a} is neither a SentencePiece model nor a file of ranks")


def _is_sentencepiece(raw: bytes) -> bool:
    """Whether `raw` is fields of a ModelProto, one after the other; what is in them is for a tokenizer to read."""
    position = 0
    while position < len(raw):
        tag, length = _varint(raw, position), None
        if tag.value & 7 == _BYTES_FIELD and tag.value >> 3 in _PIECES:
            length = _varint(raw, tag.end)
        if length is None or length.end + length.value > len(raw):
            return False
        position = length.end + length.value
    return position > 0


class _Varint(NamedTuple):
    value: int
    end: int


def _varint(raw: bytes, position: int) -> _Varint:
    """A number of at most five bytes; one that breaks off reads as beyond any file."""
    value = 0
    for i, byte in enumerate(raw[position : position + 5]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return _Varint(value, position + i + 1)
    return _Varint(1 << 62, position)
