"""Looks at the terminal before Textual is imported, then runs the console on it.

Textual reads its settings from the environment when it is imported: the theme among them. A theme of the
terminal's own colours that comes later is painted black on black where NO_COLOR is set.

Source: no-color.org; POSIX, LC_ALL, LC_CTYPE, LANG; PEP 538 (the locale that Python coerces C to).
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# Terminals of sixteen colours, whose fonts lack arrows and blocks, too.
_PLAIN_TERMINALS = ("linux", "vt", "screen", "ansi", "cons25")
_TRUECOLOUR = ("truecolor", "24bit")


@dataclass(frozen=True, slots=True)
class Setting:
    """How the console is painted.

    Attributes:
        refusal: why it cannot be; empty when it can.
        ansi: in the terminal's own sixteen colours.
        utf8: with characters beyond ASCII.
    """

    refusal: str
    ansi: bool
    utf8: bool


def setting(stdin: TextIO, stderr: TextIO, environ: Mapping[str, str]) -> Setting:
    """What the terminal allows; Textual reads from `stdin` and paints on `stderr`."""
    term = environ.get("TERM", "")
    refusal = ""
    if not (stdin.isatty() and stderr.isatty()):
        refusal = "standard input and standard error must be a terminal"
    elif term in ("", "dumb"):
        refusal = f"the terminal cannot place text on the screen (TERM={term or 'unset'})"
    remote = any(environ.get(name) for name in ("SSH_CONNECTION", "SSH_TTY", "SSH_CLIENT"))
    own = environ.get("COLORTERM", "").lower() in _TRUECOLOUR and not _is_plain(term)
    ansi = "NO_COLOR" in environ or remote or not own
    return Setting(refusal, ansi, _locale_is_utf8(environ) and not term.startswith(("linux", "vt")))


def run(home: Path, ansi: bool = False) -> int:
    """Run the console on the appliance in `home` until its operator quits.

    Args:
        home: the appliance's home directory.
        ansi: paint in the terminal's own colours whatever else it has.

    Returns:
        0, or 2 when there is no terminal for it.

    Raises:
        CloisterError: the appliance does not know this user. One that does not run is waited for on the screen.
    """
    found = setting(sys.stdin, sys.stderr, os.environ)
    if found.refusal:
        sys.stderr.write(
            f"error: NO_TERMINAL: {found.refusal}; the same is told by commands: cloister status, cloister tenant "
            "list, cloister bundle list, cloister audit query\n"
        )
        return 2
    return _run(home, ansi or found.ansi, found.utf8)


def _run(home: Path, ansi: bool, utf8: bool) -> int:
    prepare(ansi)
    from admin_tui.app import ConsoleApp
    from admin_tui.drain import TerminalDriver
    from admin_tui.port import AdminPort
    from appliance.errors import CloisterError

    port = AdminPort(home)
    try:
        port.operator()
    except CloisterError as error:
        if error.code != "NOT_RUNNING":
            raise
    app = ConsoleApp(port, shown(home), ansi=ansi, utf8=utf8, driver_class=TerminalDriver)
    try:
        app.run(mouse=False)
    finally:
        port.close()
    importing = app.state.importing
    if importing is not None and importing.running:
        print(f"the import of {importing.path} runs on; importing the same path again joins it")
    return app.return_code or 0


def prepare(ansi: bool) -> None:
    """Set what Textual reads when it is imported; of sizes it shall believe the terminal alone.

    A console that ignores hang-ups, as one begun under nohup, would outlive its terminal for ever: it shall not.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.pop("COLUMNS", None)
    os.environ.pop("LINES", None)
    os.environ["TEXTUAL_ANIMATIONS"] = "none"
    os.environ["TEXTUAL_THEME"] = "ansi-dark" if ansi else "textual-dark"


def shown(home: Path) -> str:
    """The home directory as one would type it."""
    user = Path.home()
    return f"~/{home.relative_to(user)}" if home.is_relative_to(user) and home != user else str(home)


def _is_plain(term: str) -> bool:
    return term.startswith(_PLAIN_TERMINALS) and not term.endswith(("256color", "direct"))


def _locale_is_utf8(environ: Mapping[str, str]) -> bool:
    """What the operator's locale says; LC_CTYPE=C.UTF-8 beside another LANG is Python's own doing."""
    names = [environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if environ.get(name)]
    if len(names) > 1 and names[0] == environ.get("LC_CTYPE") == "C.UTF-8":
        names = names[1:]
    return bool(names) and names[0].upper().replace("-", "").endswith("UTF8")
