"""What the terminal behind a stream can do, and how foreign text is shown on it: no escape that we did not make.

Names, paths and models' answers come from elsewhere; control characters in them could repaint an operator's
terminal. They are shown as \\x1b or \\u202e instead.

Source: no-color.org; terminfo(5) for TERM=dumb; POSIX, environment variables COLUMNS, LC_ALL, LC_CTYPE, LANG;
ECMA-48 (C0 and C1 controls); Unicode Standard Annex 9 (bidirectional formatting characters).
"""

import codecs
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

_DEFAULT_COLUMNS = 80
# C0, DEL, C1, line and paragraph separators, bidirectional controls, byte-order mark, interlinear annotation, lone
# surrogates (undecodable file names).
_CONTROL = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_CONTROL}]")
_IN_TEXT = re.compile(f"(?![\n\t])[{_CONTROL}]")


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


def printable(text: str) -> str:
    """`text` on one line with every control character spelled out."""
    return _IN_A_LINE.sub(_spelled, text)


def printable_text(text: str) -> str:
    """The same, but newlines and tabs stay: for models' answers and messages of several lines."""
    return _IN_TEXT.sub(_spelled, text)


def spelled(character: str) -> str:
    """One character as \\x1b, \\u202e or \\U0001f600."""
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _spelled(match: "re.Match[str]") -> str:
    return spelled(match[0])
