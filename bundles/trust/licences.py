"""SPDX licence expressions, and whether a site's list of licences allows one.

Source: SPDX specification 2.3, annex D: `WITH` binds tightest, then `AND`, then `OR`; identifiers are compared
without regard to case.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from bundles.format.errors import BundleError

_IDENTIFIER = r"[A-Za-z0-9][A-Za-z0-9.-]*"
_LICENCE = re.compile(rf"(DocumentRef-{_IDENTIFIER}:)?{_IDENTIFIER}\+?", re.A)
_EXCEPTION = re.compile(rf"(DocumentRef-{_IDENTIFIER}:)?{_IDENTIFIER}", re.A)
_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")
_OPERATORS = {"AND", "OR", "WITH"}
MAX_DEPTH = 32


@dataclass(frozen=True)
class Licence:
    """One licence, with an exception to it where there is one."""

    name: str
    exception: str = ""

    def is_allowed(self, allowed: Collection[str]) -> bool:
        """Whether the list has it; an exception, or "or later", only widens what the licence permits."""
        plain = self.name.removesuffix("+")
        widened = {f"{name} with {self.exception}" for name in (self.name, plain)} if self.exception else set()
        return not {name.lower() for name in (self.name, plain, *widened)}.isdisjoint(allowed)


@dataclass(frozen=True)
class Combined:
    """Licences that hold together (AND), or of which one may be chosen (OR)."""

    operator: str
    parts: tuple["Licence | Combined", ...]

    def is_allowed(self, allowed: Collection[str]) -> bool:
        """Whether the list allows all of them, or one of them."""
        verdicts = (part.is_allowed(allowed) for part in self.parts)
        return all(verdicts) if self.operator == "AND" else any(verdicts)


def parse(text: str) -> Licence | Combined:
    """The expression in `text`.

    Raises:
        BundleError: LICENCE_EXPRESSION.
    """
    words = _Words(text)
    expression = _either(words, 0)
    if words.peek():
        raise words.refused()
    return expression


def is_allowed(text: str, allowed: Collection[str]) -> bool:
    """Whether a site that allows only these licences may use what is under `text`.

    Args:
        text: an SPDX expression.
        allowed: identifiers, also with an exception ("GPL-2.0-only WITH Classpath-exception-2.0").

    Raises:
        BundleError: LICENCE_EXPRESSION.
    """
    return parse(text).is_allowed({" ".join(name.lower().split()) for name in allowed})


class _Words:
    """The words of an expression, front to back."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._words: Iterator[str] = (match[1] for match in _TOKEN.finditer(text))
        self._ahead = next(self._words, "")

    def peek(self) -> str:
        """The next word; empty at the end."""
        return self._ahead

    def take(self) -> str:
        """The next word, which is left behind."""
        word, self._ahead = self._ahead, next(self._words, "")
        return word

    def refused(self) -> BundleError:
        """Why this is none."""
        near = f"near {self._ahead[:40]!a}" if self._ahead else "at its end"
        return BundleError(
            "LICENCE_EXPRESSION",
            f"the licence {self._text[:80]!a} is no SPDX expression, {near}; mend the release",
        )


def _either(words: _Words, depth: int) -> Licence | Combined:
    parts = [_both(words, depth)]
    while words.peek() == "OR":
        words.take()
        parts.append(_both(words, depth))
    return parts[0] if len(parts) == 1 else Combined("OR", tuple(parts))


def _both(words: _Words, depth: int) -> Licence | Combined:
    parts = [_single(words, depth)]
    while words.peek() == "AND":
        words.take()
        parts.append(_single(words, depth))
    return parts[0] if len(parts) == 1 else Combined("AND", tuple(parts))


def _single(words: _Words, depth: int) -> Licence | Combined:
    if words.peek() == "(" and depth < MAX_DEPTH:
        words.take()
        inner = _either(words, depth + 1)
        if words.peek() != ")":
            raise words.refused()
        words.take()
        return inner
    name = _identifier(words, _LICENCE)
    if words.peek() != "WITH":
        return Licence(name)
    words.take()
    return Licence(name, _identifier(words, _EXCEPTION))


def _identifier(words: _Words, form: re.Pattern[str]) -> str:
    word = words.peek()
    if word.upper() in _OPERATORS or not form.fullmatch(word):
        raise words.refused()
    return words.take()
