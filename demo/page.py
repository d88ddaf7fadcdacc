"""How the demo looks: numbered steps with times, commands as one would type them, answers beside gold records."""

import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from admin_tui.terminal import Terminal, probe
from appliance.cli.output import printable

WIDTH = 80
_INDENT = "     "
_COMMA_ROOM = 24
_BOLD, _DIM, _RED, _GREEN, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"


class Page:
    """Writes the demo to standard output, 80 columns wide, with colour only where the terminal wants it."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        self._terminal = probe(sys.stdout) if terminal is None else terminal
        self._width = min(WIDTH, self._terminal.columns)
        self._number = 0
        self._open_line = False

    def title(self, text: str, *lines: str) -> None:
        """The head of the page."""
        self.line(self._styled(_BOLD, text), indent="")
        for line in lines:
            self.line(line, indent="")
        self.line("", indent="")

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One numbered step; its time stands at the right, on the title's line when nothing was printed inside."""
        self._number += 1
        head = f"{self._number:>3}. {title}"
        self._write(self._styled(_BOLD, head))
        self._open_line = True
        began = time.monotonic()
        yield
        seconds = f"{time.monotonic() - began:.1f} s"
        if self._open_line:
            self._write(f"{seconds:>{max(1, self._width - len(head))}}\n")
        else:
            self._write(f"{seconds:>{self._width}}\n")
        self._open_line = False

    def line(self, text: str = "", indent: str = _INDENT) -> None:
        """One line inside a step."""
        if self._open_line:
            self._write("\n")
            self._open_line = False
        self._write(f"{indent}{text}".rstrip() + "\n")

    def command(self, argv: Sequence[str]) -> None:
        """A command, as one would type it, continued over lines at its options."""
        room = self._width - len(_INDENT) - 4
        rows, row = [], "$"
        for word in _options_with_values(argv):
            if len(row) + 1 + len(word) > room:
                rows.append(row)
                row = "   "
            row += f" {word}"
        for text in (*(f"{row} \\" for row in rows), row):
            self.line(self._styled(_DIM, text))

    def paragraph(self, text: str, indent: str = _INDENT + "  ") -> None:
        """Text that comes from elsewhere, wrapped; its own line ends stay."""
        for line in text.splitlines():
            for part in textwrap.wrap(printable(line), self._width - len(indent) - 1) or [""]:
                self.line(part, indent)

    def block(self, text: str) -> None:
        """Lines that a command printed for a page of this width, as they are."""
        for line in text.splitlines():
            self.line(printable(line))

    def rule(self, text: str) -> None:
        """A heading inside a step."""
        self.line(self._styled(_BOLD, f"-- {text} ".ljust(self._width - len(_INDENT), "-")))

    def stream(self, pieces: Iterator[str], indent: str = _INDENT + "  ") -> str:
        """Write text as it comes, breaking lines after a comma near the page's edge, or at the edge; all of it."""
        self.line("", indent="")
        room, column, whole = self._width - len(indent) - 1, 0, ""
        self._write(indent)
        for piece in pieces:
            whole += piece
            for character in printable(piece):
                self._write(character)
                column += 1
                if column == room or (character == "," and column > room - _COMMA_ROOM):
                    self._write(f"\n{indent}")
                    column = 0
        self._write("\n\n")
        return whole

    def compare(self, answer: Mapping[str, object], gold: Mapping[str, object], right: Mapping[str, bool]) -> None:
        """Answer and gold record side by side, a line per field; what is wrong says so in words."""
        half = (self._width - len(_INDENT) - 2 - 11 - 9) // 2
        self.line(self._styled(_BOLD, f"  {'field':<11}{'answer':<{half}}{'gold record':<{half}}"))
        for name, want in gold.items():
            got = "(absent)" if name not in answer else _shown(answer[name])
            row = f"  {printable(name):<11}{_cut(got, half)}{_cut(_shown(want), half)}"
            mark = self._styled(_GREEN, "right") if right[name] else self._styled(_RED, "<- WRONG")
            self.line(row + mark)

    def good(self, text: str) -> None:
        """A line that says that what should hold does."""
        self.line(self._styled(_GREEN, "ok ") + " " + text)

    def _styled(self, style: str, text: str) -> str:
        return f"{style}{text}{_PLAIN}" if self._terminal.colour else text

    def _write(self, text: str) -> None:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


def _options_with_values(argv: Sequence[str]) -> Iterator[str]:
    """Words that belong on one line: an option and its value."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--") and words and not words[0].startswith("--"):
            word += f" {words.pop(0)}"
        yield word


def _shown(value: object) -> str:
    return "(none)" if value is None else printable(str(value))


def _cut(text: str, width: int) -> str:
    """`text` in a column of `width`, with a gap behind it."""
    return (text if len(text) < width else text[: width - 4] + "...").ljust(width)
