"""What a canary's answer is held to: exact, prefix, contains, json or json_fields.

Text is compared code point by code point, without the blanks around it. JSON is compared as values: the order of
an object's members does not matter, 1 and 1.0 are equal, true is no number, and a member that stands twice, NaN or
Infinity make a text no JSON (RFC 8259, read strictly).
"""

import json
from collections.abc import Callable
from typing import Any

MATCHES = ("exact", "prefix", "contains", "json", "json_fields")
_UNREADABLE = object()


def holds(match: str, expected: str, answer: str) -> bool:
    """Whether an answer is what a canary expects; never raises, whatever either text is.

    Args:
        match: one of `MATCHES`; any other holds for no answer.
        expected: text, or JSON for the two that compare values.
        answer: of the model.
    """
    predicate = _PREDICATES.get(match)
    try:
        return predicate is not None and predicate(expected.strip(), answer.strip())
    except RecursionError:  # nested deeper than Python compares
        return False


def _json(expected: str, answer: str) -> bool:
    wanted, found = _value(expected), _value(answer)
    return wanted is not _UNREADABLE and _equal(wanted, found)


def _json_fields(expected: str, answer: str) -> bool:
    wanted, found = _value(expected), _value(answer)
    if not isinstance(wanted, dict) or not isinstance(found, dict):
        return False
    return all(name in found and _equal(value, found[name]) for name, value in wanted.items())


_PREDICATES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda expected, answer: answer == expected,
    "prefix": lambda expected, answer: answer.startswith(expected),
    "contains": lambda expected, answer: expected in answer,
    "json": _json,
    "json_fields": _json_fields,
}


def _value(text: str) -> Any:
    """The value of a JSON text; a mark that equals nothing where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return _UNREADABLE


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def _equal(one: Any, other: Any) -> bool:
    """Equal as JSON values; Python alone takes True for 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
