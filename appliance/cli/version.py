"""`cloister version`: of the appliance and of what it runs on, read from the installed packages' metadata."""

import argparse
import platform
import sqlite3
from importlib import metadata

from appliance.cli.output import emit, table

_SHOWN = ("grpcio", "protobuf", "torch", "triton", "tokenizers", "safetensors", "sqlalchemy", "cryptography")


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister version`."""
    parser.set_defaults(run=_version)


def versions() -> dict[str, str]:
    """What is installed; nothing is imported for it."""
    found = {"cloister": metadata.version("cloister"), "python": platform.python_version()}
    found["sqlite"] = sqlite3.sqlite_version
    for name in _SHOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _version(args: argparse.Namespace) -> int:
    found = versions()
    emit(args, found, table(("what", "version"), found.items()))
    return 0
