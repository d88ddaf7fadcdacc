"""Mutations of bytes and JSON that keep most of what a parser looks for, so that it gets to its later doubts."""

import json
import struct
from copy import deepcopy
from random import Random
from typing import Any

_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    256,
    511,
    512,
    4095,
    4096,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_WORDS = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"-0",
    b"1e400", b"1.0", b"NaN", b"-Infinity", b"..", b"/", b"\x80\x04", b"ustar\x0000", b"9" * 20, b"\r\n", b" ",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63, -(2**63), 0.5, "", "0", "a" * 300, "\0", "..",
    "\u202e", "\ud800", "\u00e9", "e\u0301", [], {}, [[]], {"": ""}, "f" * 64, "2026-01-31T23:59:59Z",
    "9999-12-31T23:59:59Z",
)  # fmt: skip


def mutated(random: Random, raw: bytes, other: bytes = b"") -> bytes:
    """`raw` after one to four changes; `other` is what it is spliced with."""
    changed = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(changed))
        span = random.choice((1, 2, 4, 8, 64, 512))
        random.choice(_CHANGES)(random, changed, at, span, other or raw)
    return bytes(changed)


def _flip(random: Random, raw: bytearray, at: int, span: int, other: bytes) -> None:
    if at < len(raw):
        raw[at] ^= 1 << random.randint(0, 7)


def _cut(random: Random, raw: bytearray, at: int, span: int, other: bytes) -> None:
    del raw[at : at + span]


def _truncate(random: Random, raw: bytearray, at: int, span: int, other: bytes) -> None:
    del raw[at:]


def _repeat(random: Random, raw: bytearray, at: int, span: int, other: bytes) -> None:
    raw[at:at] = raw[at : at + span]


def _word(random: Random, raw: bytearray, at: int, span: int, other: bytes) -> None:
    word = random.choice(_WORDS)
    raw[at : at + random.choice((0, len(word)))] = word


def _splice(random: Random, raw: bytearray, at: int, span: int, other: bytes) -> None:
    start = random.randint(0, len(other))
    raw[at : at + random.choice((0, span))] = other[start : start + span]


def _number(random: Random, raw: bytearray, at: int, span: int, other: bytes) -> None:
    number = random.choice(_NUMBERS)
    form = random.choice(("<Q", ">Q", "<I", "oct", "dec"))
    if form in ("oct", "dec"):
        text = b"%011o\0" % number if form == "oct" else b"%d" % number
    else:
        text = struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
    raw[at : at + len(text)] = text


_CHANGES = (_flip, _flip, _cut, _truncate, _repeat, _word, _splice, _number)


def mutated_json(random: Random, value: Any) -> Any:
    """A JSON value after one to three changes of its nodes."""
    root = [deepcopy(value)]
    for _ in range(random.randint(1, 3)):
        holder, key = random.choice(_places(root))
        _NODES[random.randrange(len(_NODES))](random, root, holder, key)
    return root[0] if root else None


def _places(root: Any) -> list[tuple[Any, Any]]:
    """Every place in a value: what holds it, and under which key."""
    found: list[tuple[Any, Any]] = []
    stack = [root]
    while stack:
        holder = stack.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])
    return found or [(root, 0)]


def _replace(random: Random, root: Any, holder: Any, key: Any) -> None:
    holder[key] = deepcopy(random.choice(_VALUES))


def _nudge(random: Random, root: Any, holder: Any, key: Any) -> None:
    """A near miss of what was there."""
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = value + random.choice((-1, 1, 4096, -4096))
    elif isinstance(value, str):
        at = random.randint(0, len(value))
        holder[key] = (
            value[:at]
            + random.choice(("", "/", ".", "\u00e9", "0", "A", " "))
            + value[at + random.randint(0, 1) :]
        )


def _remove(random: Random, root: Any, holder: Any, key: Any) -> None:
    if holder is not root:
        del holder[key]


def _twice(random: Random, root: Any, holder: Any, key: Any) -> None:
    if isinstance(holder, list) and holder is not root:
        holder.insert(random.randint(0, len(holder)), deepcopy(holder[key]))
    elif isinstance(holder, dict):
        holder[random.choice(("x", key.upper(), f"{key} "))] = deepcopy(holder[key])


def _exchange(random: Random, root: Any, holder: Any, key: Any) -> None:
    """With a node from elsewhere."""
    other, where = random.choice(_places(root))
    holder[key] = deepcopy(other[where])


def _wrap(random: Random, root: Any, holder: Any, key: Any) -> None:
    for _ in range(random.choice((1, 2, 40))):
        holder[key] = [holder[key]]


_NODES = (_replace, _replace, _nudge, _nudge, _remove, _twice, _exchange, _wrap)


def written(random: Random, value: Any) -> bytes:
    """JSON text of a value, in one of the ways to write it; most are legal."""
    separators = random.choice(((",", ":"), (", ", ": "), (" ,\n", "\t: ")))
    return json.dumps(value, separators=separators, ensure_ascii=random.random() < 0.5).encode(
        errors="surrogatepass"
    )
