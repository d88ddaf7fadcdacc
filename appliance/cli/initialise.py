"""`cloister init`: hands over to `python -m appliance.control.init`, which alone may write the databases."""

import argparse
import os
import sys
from pathlib import Path


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister init`."""
    parser.add_argument(
        "--operator",
        required=True,
        type=_operator,
        metavar="NAME=USER",
        help="the first operator, and the operating-system user who is this operator",
    )
    parser.add_argument("--site", required=True, help="name of this site; part of every certificate's identity")
    parser.add_argument(
        "--profile",
        choices=("site", "demo"),
        default="site",
        help="demo: marks a home that is for showing; always displayed, and sealed in the audit log for ever",
    )
    parser.add_argument(
        "--listen-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a DNS name or address that clients call the gateway by; may be repeated (localhost always holds)",
    )
    parser.add_argument(
        "--root", type=Path, metavar="ROOT.json", help="root of trust for bundles, from `cloister trust init`"
    )
    parser.set_defaults(run=_init)


def _operator(text: str) -> str:
    """NAME=USER; a USER that is empty is most often a shell variable that is not set."""
    name, _, user = text.partition("=")
    if not name or not user:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=USER; for yourself: {name or 'alice'}=$(id -un)")
    return text


def _init(args: argparse.Namespace) -> int:
    words = ["--home", str(args.home), "--operator", args.operator, "--site", args.site, "--profile", args.profile]
    for name in args.listen_name:
        words += ["--listen-name", name]
    if args.root:
        words += ["--root", str(args.root.absolute())]
    if args.json:
        words.append("--json")
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "appliance.control.init", *words]
    os.execv(sys.executable, command)  # noqa: S606  # a fixed program; no shell is wanted
