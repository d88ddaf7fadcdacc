"""Kinds of argument that several verbs take."""

import argparse

_MAX = (1 << 31) - 1


def positive(text: str) -> int:
    """A whole number from 1 to 2^31 - 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or not 1 <= int(text) <= _MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def names(text: str) -> list[str]:
    """Names between commas; none at all for an empty text."""
    return [name.strip() for name in text.split(",") if name.strip()]
