"""JSON with one reading only: what two parsers could understand differently is refused.

Refused beyond RFC 8259: a byte order mark, duplicate keys, NaN and Infinity, integers beyond 2^53, nesting beyond
32, more values than memory should hold, lone surrogates, bytes after the value and, unless asked for, fractions.
Every signed document of a bundle is read here, from the very bytes that verified.

Source: RFC 8259 sections 4, 6, 8.1 and 9; RFC 7493 (I-JSON).
"""

import json
import math
from collections.abc import Callable
from typing import NoReturn

from bundles.format.errors import BundleError

MAX_DEPTH = 32
MAX_INTEGER = 2**53
MAX_VALUES = 1_500_000  # of the documents that are read before anybody's signature is known to hold
_DIGITS = 16  # of 2^53
_MANY_DIGITS = 64
_BOM = b"\xef\xbb\xbf"


def parse(raw: bytes, what: str, *, any_number: bool = False) -> object:
    """The value that `raw` holds.

    Args:
        raw: the document, UTF-8.
        what: names the document in errors.
        any_number: fractions and large integers are allowed; models' configuration has them (1e-6, 10**30).

    Raises:
        BundleError: JSON_BOM, JSON_ENCODING, JSON_SYNTAX, JSON_TRAILING, JSON_DUPLICATE_KEY, JSON_CONSTANT,
            JSON_FLOAT, JSON_INTEGER, JSON_DEPTH, JSON_VALUES or JSON_SURROGATE.
    """
    if raw.startswith(_BOM):
        raise BundleError("JSON_BOM", f"{what} begins with a byte order mark")
    # Counted in strings, too: a document is refused for its commas before one object is made.
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        raise BundleError("JSON_VALUES", f"{what} has over {MAX_VALUES} values")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError("JSON_ENCODING", f"{what} is not UTF-8 at byte {error.start}") from None
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=_without_duplicates(what),
            parse_int=_bounded_integer(what, _MANY_DIGITS if any_number else _DIGITS),
            parse_float=_bounded_float(what)
            if any_number
            else _refused("JSON_FLOAT", f"{what} has a number with a fraction"),
            parse_constant=_refused("JSON_CONSTANT", f"{what} has NaN or Infinity"),
        )
    except json.JSONDecodeError as error:
        code = "JSON_TRAILING" if error.msg == "Extra data" else "JSON_SYNTAX"
        raise BundleError(code, f"{what}: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise BundleError("JSON_DEPTH", f"{what} is nested deeper than {MAX_DEPTH}") from None
    _check(value, what, 0)
    return value


def parse_object(raw: bytes, what: str, *, any_number: bool = False) -> dict[str, object]:
    """Like `parse`, for a document that must be an object.

    Raises:
        BundleError: as `parse`, or JSON_NOT_OBJECT.
    """
    value = parse(raw, what, any_number=any_number)
    if not isinstance(value, dict):
        raise BundleError("JSON_NOT_OBJECT", f"{what} is not a JSON object")
    return value


def _without_duplicates(what: str) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise BundleError("JSON_DUPLICATE_KEY", f"{what} has an object with a key twice")
        return result

    return build


def _bounded_integer(what: str, most_digits: int) -> Callable[[str], int]:
    def convert(digits: str) -> int:
        number = int(digits) if len(digits.lstrip("-")) <= most_digits else None
        if number is None or (most_digits == _DIGITS and abs(number) > MAX_INTEGER):
            raise BundleError("JSON_INTEGER", f"{what} has an integer beyond what is accepted")
        return number

    return convert


def _bounded_float(what: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise BundleError("JSON_CONSTANT", f"{what} has a number that reads as Infinity")
        return number

    return convert


def _refused(code: str, message: str) -> Callable[[str], NoReturn]:
    def refuse(_: str) -> NoReturn:
        raise BundleError(code, message)

    return refuse


def _check(value: object, what: str, depth: int) -> None:
    """Refuse lone surrogates, and an object or list that stands in 32 others."""
    if depth == MAX_DEPTH and isinstance(value, dict | list):
        raise BundleError("JSON_DEPTH", f"{what} is nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        _check_text(value, what)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, what)
            _check(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, what, depth + 1)


def _check_text(text: str, what: str) -> None:
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BundleError("JSON_SURROGATE", f"{what} has half of a surrogate pair")
