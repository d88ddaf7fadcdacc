"""A terminal that a test types into and reads: tmux, one server of its own per test."""

import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="NOT RUN: tmux is not installed here")
LIMIT_S = 60.0


class Terminal:
    """One pane of 80x24."""

    def __init__(self, socket: str) -> None:
        self._tmux = ["tmux", "-L", socket, "-f", "/dev/null"]
        self.pane = ""

    def start(self, words: list[str], environ: Mapping[str, str], term: str, size: tuple[int, int]) -> None:
        """Run a shell that runs the words, then tells the exit status; the pane stays."""
        given = [f"{name}={value}" for name, value in environ.items()]
        unset = [f"-u{name}" for name in ("NO_COLOR", "COLORTERM", "LC_ALL", "LC_CTYPE", "SSH_CONNECTION", "TMUX")]
        script = '"$@"; echo "ended with $?"; cat'
        program = [
            "env",
            *unset,
            *given,
            f"TERM={term}",
            "bash",
            "--norc",
            "--noprofile",
            "-c",
            script,
            "-",
            *words,
        ]
        self._do("new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), *program)
        self.pane = self._do("list-panes", "-a", "-F", "#{pane_id}").strip()

    def type(self, *keys: str) -> None:
        """Send keys, as tmux names them."""
        self._do("send-keys", "-t", self.pane, *keys)

    def paste(self, text: str) -> None:
        """Send text as it is."""
        self._do("send-keys", "-t", self.pane, "-l", text)

    def text(self) -> str:
        """What the pane shows."""
        return self._do("capture-pane", "-p", "-t", self.pane)

    def attributes(self) -> str:
        """The same with the colours."""
        return self._do("capture-pane", "-p", "-e", "-t", self.pane)

    def pid(self) -> int:
        """The shell in the pane."""
        return int(self._do("display-message", "-p", "-t", self.pane, "#{pane_pid}"))

    def until(self, pattern: str) -> str:
        """Wait until the pane shows what matches."""
        end = time.monotonic() + LIMIT_S
        while not re.search(pattern, text := self.text()):
            assert time.monotonic() < end, f"{pattern!r} never came:\n{text}"
            time.sleep(0.05)
        return text

    def hang_up(self) -> None:
        """Close the pane as a lost connection does: SIGHUP to what runs in it."""
        self._do("kill-pane", "-t", self.pane)

    def close(self) -> None:
        """End the server; nothing of it is left."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True)

    def _do(self, *words: str) -> str:
        done = subprocess.run([*self._tmux, *words], capture_output=True, text=True)
        assert done.returncode == 0, (words[0], done.stderr)
        return done.stdout


@contextmanager
def terminal(
    words: list[str],
    environ: Mapping[str, str] | None = None,
    term: str = "tmux-256color",
    size: tuple[int, int] = (80, 24),
) -> Iterator[Terminal]:
    """A terminal that runs the words."""
    pane = Terminal(f"cl-{uuid.uuid4().hex[:8]}")
    try:
        pane.start(words, {"LANG": "C.UTF-8", **(environ or {})}, term, size)
        yield pane
    finally:
        pane.close()
