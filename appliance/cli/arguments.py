"""Kinds of argument that several verbs take; what does not fit is bad usage before anybody is asked anything."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

_MAX = (1 << 31) - 1
MAX_SECONDS = 86_400.0


def whole(least: int, most: int) -> Callable[[str], int]:
    """A kind of argument: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    return number


positive = whole(1, _MAX)
"""A whole number from 1 to 2^31 - 1."""

days = whole(1, 36_500)
"""A number of days, at most a hundred years."""


def real(text: str) -> float:
    """A number that is finite.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return number


def seconds(text: str) -> float:
    """A length of time: more than nothing, at most a day.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    number = real(text)
    if not 0 < number <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not above 0 and at most {MAX_SECONDS:g} seconds")
    return number


def directory(text: str) -> Path:
    """The absolute path of a directory, `~` included; text, because it travels in messages and addresses.

    Raises:
        argparse.ArgumentTypeError: it is not UTF-8.
    """
    path = Path(text).expanduser().absolute()
    if not is_text(str(path)):
        raise argparse.ArgumentTypeError(f"{os.fsencode(path)!r} is not UTF-8")
    return path


def is_text(word: str) -> bool:
    """The bytes that `word` was on the command line were text in its encoding."""
    return not any("\ud800" <= character <= "\udfff" for character in word)


def names(text: str) -> list[str]:
    """Names between commas; none at all for an empty text."""
    return [name.strip() for name in text.split(",") if name.strip()]
