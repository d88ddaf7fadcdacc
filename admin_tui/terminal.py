"""What the terminal behind a stream can do: width, UTF-8, colour, and whether it is a terminal at all.

Source: no-color.org; terminfo(5) for TERM=dumb; POSIX, environment variables COLUMNS, LC_ALL, LC_CTYPE, LANG.
"""

import codecs
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

_DEFAULT_COLUMNS = 80


@dataclass(frozen=True, slots=True)
class Terminal:
    """What may be written to a stream.

    Attributes:
        tty: the stream is a terminal that can go back to the start of a line.
        columns: cells in a line; 80 where nobody knows.
        utf8: characters beyond ASCII arrive as they are.
        colour: escape sequences for colour and weight are wanted.
    """

    tty: bool
    columns: int
    utf8: bool
    colour: bool


def probe(stream: TextIO, environ: Mapping[str, str] | None = None) -> Terminal:
    """Look at `stream` and the environment; nothing is written."""
    env = os.environ if environ is None else environ
    tty = stream.isatty() and env.get("TERM", "dumb") not in ("dumb", "")
    return Terminal(tty, _columns(stream, env, tty), _is_utf8(stream), tty and not env.get("NO_COLOR"))


def _columns(stream: TextIO, env: Mapping[str, str], tty: bool) -> int:
    """COLUMNS wins, as POSIX has it; then the kernel; then 80."""
    if env.get("COLUMNS", "").isdecimal() and int(env["COLUMNS"]) > 0:
        return int(env["COLUMNS"])
    if tty:
        try:
            return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
        except OSError:
            return _DEFAULT_COLUMNS
    return _DEFAULT_COLUMNS


def _is_utf8(stream: TextIO) -> bool:
    """What Python encodes with is what the locale says."""
    try:
        return codecs.lookup(stream.encoding or "ascii").name == "utf-8"
    except LookupError:
        return False
