"""`cloister console`: the appliance on a terminal of at least 80x24."""

import argparse

from appliance.cli.output import emit


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister console`."""
    parser.epilog = (
        "It only looks, but for importing a bundle. Other commands do the same: cloister console --keys."
    )
    parser.add_argument("--ansi", action="store_true", help="paint in the terminal's own sixteen colours")
    parser.add_argument(
        "--keys", action="store_true", help="print its keys, and for each the command that does the same"
    )
    parser.set_defaults(run=_console)


def _console(args: argparse.Namespace) -> int:
    if args.keys:
        return _keys(args)
    from admin_tui.launch import run

    return run(args.home, args.ansi)


def _keys(args: argparse.Namespace) -> int:
    from admin_tui.actions import ACTIONS, keys_as_text

    value = [
        {"id": a.id, "keys": a.keys, "title": a.title, "command": a.command, "calls": a.calls} for a in ACTIONS
    ]
    emit(args, value, keys_as_text())
    return 0
