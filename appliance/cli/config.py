"""`cloister config`: the settings file judged, shown and explained; needs no running appliance.

Loads the settings' models only when a verb runs; `--help` does not wait for them.
"""

import argparse
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.output import emit, printable, table

if TYPE_CHECKING:
    from appliance.settings_file import Configuration

# Flag of `cloister serve` -> the setting it takes the place of.
FLAGS = {"listen": "gateway.listen", "inventory": "devices.inventory"}


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister config`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    check = verbs.add_parser("check", help="judge a settings file: names, types, ranges; exit status 3 on a fault")
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: cloister.toml in the home")
    check.set_defaults(run=_check)
    show = verbs.add_parser("show", help="what `cloister serve` would run with, and where each value comes from")
    add_flags(show)
    show.set_defaults(run=_show)
    verbs.add_parser("example", help="a settings file with every setting explained").set_defaults(run=_example)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `cloister serve` that go before the file."""
    parser.add_argument(
        "--listen",
        type=_address,
        metavar="HOST:PORT",
        help="where clients connect; port 0 takes a free one (default: gateway.listen of cloister.toml)",
    )
    parser.add_argument(
        "--inventory",
        type=_path,
        metavar="FILE",
        help="a recorded inventory of devices instead of this machine's own (default: devices.inventory)",
    )


def configuration(args: argparse.Namespace) -> "Configuration":
    """The settings that hold for this command's home and flags.

    Raises:
        CloisterError: CONFIG_INVALID.
    """
    from appliance import settings_file

    given = {key: getattr(args, flag) for flag, key in FLAGS.items() if getattr(args, flag) is not None}
    return settings_file.load(args.home / settings_file.FILE, given)


def _check(args: argparse.Namespace) -> int:
    from appliance import settings_file

    file = args.file.absolute() if args.file else args.home / settings_file.FILE
    there = file.exists()
    entries = list(settings_file.load(file).entries())
    found = {entry.key: entry.value for entry in entries if entry.source == "file"}
    value = {"file": str(file), "exists": there, "settings": found}
    said = (
        f"sets {len(found)} of {len(entries)} settings" if there else "is not there; every setting is its default"
    )
    emit(args, value, f"ok: {printable(str(file))} {said}")
    return 0


def _show(args: argparse.Namespace) -> int:
    entries = list(configuration(args).entries())
    rows = [(entry.key, _shown(entry.value), entry.source, _shown(entry.default), entry.unit) for entry in entries]
    header = ("setting", "value", "from", "default", "unit")
    emit(args, {entry.key: asdict(entry) for entry in entries}, table(header, rows))
    return 0


def _example(args: argparse.Namespace) -> int:
    from appliance import settings_file

    text = settings_file.example()
    emit(args, {"example": text}, text.rstrip("\n"))
    return 0


def _shown(value: object) -> str:
    return textwrap.shorten(f"{value:g}" if isinstance(value, float) else str(value), 48, placeholder="…")


def _path(text: str) -> str:
    return str(Path(text).expanduser().absolute())


def _address(text: str) -> str:
    from appliance.settings import split_address

    try:
        split_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
