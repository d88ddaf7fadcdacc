"""What may be in a model folder at all: a list of allowed kinds, each recognised by name and by its first bytes.

Nothing is scanned for malice: a format that can carry code is refused whole, whatever it is called.
"""

import re
from collections.abc import Iterable

from bundles.format import strict_json
from bundles.format.errors import BundleError

MAX_SMALL_FILE = 256 * 1024 * 1024
MAX_CONFIG = 16 * 1024 * 1024
_PICKLES = re.compile(r"\.(?:bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz|h5|keras|msgpack|onnx|pb|tflite)$", re.I)
_CODE = re.compile(
    r"\.(?:py|pyc|pyd|pyx|so(?:\.\d+)*|dll|dylib|exe|sh|bash|js|wasm|ptx|cubin|cu|cpp|c|jar|rb)$", re.I
)
_ALLOWED = re.compile(
    r"\.(?:safetensors|json|jinja|txt|md|model)$|^(?:licen[cs]e|notice|copying|readme)[^/]*$", re.I
)
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines"})
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "CONTENT_PICKLE", "a zip archive, as torch.save writes"),
    (b"PK\x05\x06", "CONTENT_PICKLE", "a zip archive"),
    (b"\x1f\x8b", "CONTENT_TYPE", "a gzip file"),
    (b"GGUF", "CONTENT_TYPE", "a GGUF file"),
    (b"\x93NUMPY", "CONTENT_PICKLE", "a numpy file"),
    (b"\x89HDF", "CONTENT_PICKLE", "an HDF5 file"),
    (b"\x7fELF", "CONTENT_CODE", "an ELF program"),
    (b"MZ", "CONTENT_CODE", "a Windows program"),
    (b"#!", "CONTENT_CODE", "a script"),
)
_PICKLE_MAGIC = re.compile(rb"\x80[\x00-\x05](?:[\x95}\]()c\x8ax\x8c\x80.KMNX])", re.DOTALL)


def check_names(paths: Iterable[str]) -> None:
    """Refuse files by their names, before any byte of them is read.

    Raises:
        BundleError: CONTENT_PICKLE, CONTENT_CODE, CONTENT_TYPE.
    """
    for path in paths:
        name = path.rpartition("/")[2]
        if _PICKLES.search(name):
            raise BundleError(
                "CONTENT_PICKLE", f"{path!a} is of a kind that can carry code; convert to safetensors"
            )
        if _CODE.search(name):
            raise BundleError("CONTENT_CODE", f"{path!a} is a program; a model is data only")
        if not _ALLOWED.search(name):
            raise BundleError("CONTENT_TYPE", f"{path!a} is of no kind that a bundle may hold")


def check_magic(path: str, first: bytes) -> None:
    """Refuse a file that is something else than its name says.

    Args:
        path: names the file in errors.
        first: its first bytes, 16 or more where it has them.

    Raises:
        BundleError: CONTENT_PICKLE, CONTENT_CODE, CONTENT_TYPE.
    """
    # The first bytes of safetensors are a length and may be anything; the header's own check follows.
    if path.lower().endswith(".safetensors") and first[8:9] == b"{":
        return
    if _PICKLE_MAGIC.match(first):
        raise BundleError("CONTENT_PICKLE", f"{path!a} holds a pickle")
    for magic, code, what in _MAGIC:
        if first.startswith(magic):
            raise BundleError(code, f"{path!a} is {what}")


def check_text(path: str, content: bytes) -> None:
    """Refuse text that is not UTF-8 or holds NUL.

    Raises:
        BundleError: CONTENT_TEXT.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError("CONTENT_TEXT", f"{path!a} is not UTF-8 text") from None
    if "\0" in text:
        raise BundleError("CONTENT_TEXT", f"{path!a} holds NUL characters")


def check_config(path: str, content: bytes) -> None:
    """Refuse a configuration file that asks for code to be run.

    Raises:
        BundleError: CONTENT_REMOTE_CODE, or a JSON code.
    """
    if _names_code(strict_json.parse(content, path, any_number=True)):
        raise BundleError("CONTENT_REMOTE_CODE", f"{path!a} asks for code from outside the engine (auto_map)")


def _names_code(value: object) -> bool:
    if isinstance(value, dict):
        # "trust_remote_code": false asks for nothing, auto_map always does.
        return any(key in _CODE_KEYS and item is not False for key, item in value.items()) or any(
            map(_names_code, value.values())
        )
    return isinstance(value, list) and any(map(_names_code, value))
