"""The `cloister` command: finds the noun, loads its module alone, runs the verb, reports errors."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from appliance.cli import arguments, failure, output

# Noun or top-level verb -> what it is for. Its module is appliance.cli.NOUN, with `register(parser)`; this table
# is all that `cloister --help` reads, so that help costs no import.
NOUNS: dict[str, str] = {
    "init": "make the home directory: databases, certificate authority, first operator",
    "serve": "run the appliance until SIGTERM",
    "status": "processes, deployments and audit log of the running appliance",
    "console": "the running appliance on a terminal of at least 80x24",
    "doctor": "check this machine and home directory, with a remedy for each finding",
    "config": "the settings file: judged, shown, explained",
    "generate": "complete a prompt, as a tenant's application",
    "chat": "send one chat message, as a tenant's application",
    "embed": "vectors of texts, as a tenant's application",
    "rerank": "documents by how well they answer a query, as a tenant's application",
    "tokenize": "a text's tokens, as a tenant's application",
    "detokenize": "the text of tokens, as a tenant's application",
    "version": "versions of the appliance and of what it runs on",
    "trust": "signing keys and the root of trust",
    "bundle": "build, sign, verify and import model bundles",
    "model": "deployments: a model version made to run",
    "gpu": "devices, and the memory a model would take of them",
    "alias": "the model names that clients call",
    "tenant": "tenants: who may call which models, and how much",
    "key": "client certificates and API keys of tenants' applications",
    "audit": "read and verify the audit log",
    "bench": "measure this machine: the importer, the engine, and what applications see",
}
_MODULES = {"init": "initialise"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed, 2 bad usage, 3 refused (verification, policy, tampering), 4 not reachable.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(_noun_of(words))
    for word in words:
        if not arguments.is_text(word):
            parser.error(f"{os.fsencode(word)!r} is not UTF-8; so no name, path or text may be")
    args = parser.parse_args(words)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return 2
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to say at exit
        return 141
    except Exception as error:
        failed = failure.describe(error)
        output.emit_error(args.json, failed)
        return failed.exit_status
    return status


def build_parser(noun: str | None) -> argparse.ArgumentParser:
    """The whole grammar; of the nouns only `noun` has its verbs, the others are names with a line of help."""
    parser = argparse.ArgumentParser(
        prog="cloister",
        description="Cloister: language models on your own machine, behind your own door.",
        epilog="exit status: 0 done, 1 failed, 2 bad usage, 3 refused, 4 not reachable",
        allow_abbrev=False,
    )
    _add_common(parser, os.environ.get("CLOISTER_HOME") or "~/.cloister", False)
    nouns = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, purpose in NOUNS.items():
        sub = nouns.add_parser(name, help=purpose, description=_sentence(purpose), allow_abbrev=False)
        if name == noun:
            importlib.import_module(f"appliance.cli.{_MODULES.get(name, name)}").register(sub)
            _add_common_to_leaves(sub)
    return parser


def _noun_of(words: Sequence[str]) -> str | None:
    """The first word that is neither a global option nor its value."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scout.add_argument("--home")
    scout.add_argument("--json", action="store_true")
    scout.add_argument("noun", nargs="?")
    scout.add_argument("rest", nargs=argparse.REMAINDER)
    try:
        noun = scout.parse_known_args(words)[0].noun
    except argparse.ArgumentError:
        return None
    return noun if noun in NOUNS else None


def _add_common(parser: argparse.ArgumentParser, home: object, as_json: object) -> None:
    parser.add_argument(
        "--home",
        type=arguments.directory,
        default=home,
        metavar="DIR",
        help="home directory of the appliance (CLOISTER_HOME; default ~/.cloister)",
    )
    parser.add_argument("--json", action="store_true", default=as_json, help="print JSON")


def _add_common_to_leaves(parser: argparse.ArgumentParser) -> None:
    """The global options hold after the verb too; what is not given there leaves the earlier value alone."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for group in groups:
        for child in dict.fromkeys(group.choices.values()):
            _add_common_to_leaves(child)
    if not groups:
        _add_common(parser, argparse.SUPPRESS, argparse.SUPPRESS)


def _sentence(purpose: str) -> str:
    return purpose[0].upper() + purpose[1:] + "."


if __name__ == "__main__":
    raise SystemExit(main())
