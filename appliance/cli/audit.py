"""`cloister audit`: read and verify the audit log."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.cli.failure import BAD_USAGE, REFUSED, Failure, UsageError
from appliance.cli.output import emit, emit_error, emit_line, plain, printable

if TYPE_CHECKING:
    from appliance.protos import admin_pb2


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister audit`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    tail = verbs.add_parser("tail", help="the newest records, oldest first; with --json one object a line")
    tail.add_argument("-n", type=_count, default=20, dest="count", metavar="N", help="how many (default 20)")
    tail.add_argument("--follow", action="store_true", help="wait for new ones until interrupted")
    tail.set_defaults(run=_tail)
    verify = verbs.add_parser(
        "verify",
        help="check every record against the signed head; exit 3 and the first bad record if it does not hold",
        description="Check every record against the signed head. Without --file the running appliance does it; "
        "with --file the files are judged here, and no appliance need run.",
    )
    verify.add_argument("--file", type=Path, metavar="DB", help="an audit.db, for use without an appliance")
    verify.add_argument("--head", type=Path, metavar="HEAD", help="its audit.head (default: beside DB)")
    verify.add_argument("--key", type=Path, metavar="PUB", help="public key of the log: verifier key or PEM")
    verify.set_defaults(run=_verify)


def _tail(args: argparse.Namespace) -> int:
    from appliance.client.admin import AdminClient
    from appliance.protos import admin_pb2

    with AdminClient(args.home) as admin:
        size = admin.system.GetStatus(admin_pb2.GetStatusRequest()).audit_size
        after = max(0, size - args.count)
        request = admin_pb2.TailAuditRequest(after_sequence=after, limit=args.count, follow=args.follow)
        if not args.count and not args.follow:
            return 0
        for record in admin.audit.TailAudit(request):
            emit_line(args, _value(record), _line(record))
    return 0


def _value(record: "admin_pb2.TailAuditResponse") -> dict[str, Any]:
    """The record with its body parsed, so that one JSON reader does for both."""
    value = plain(record)
    value["body"] = json.loads(value.pop("body_json") or "null")
    return value


def _line(record: "admin_pb2.TailAuditResponse") -> str:
    time = record.time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
    words = (record.kind, record.phase, record.decision, record.actor, record.tenant, record.request_id)
    return f"{record.sequence:>8}  {time}Z  " + "  ".join(printable(word) or "-" for word in words)


def _verify(args: argparse.Namespace) -> int:
    verdict = _of_files(args) if args.file else _of_appliance(args)
    emit(args, verdict, _text(verdict))
    if verdict["intact"]:
        return 0
    metadata = {"reason": str(verdict["reason"]), "sequence": str(verdict["first_bad_sequence"])}
    message = f"{verdict['reason']}: {verdict['message']}"
    emit_error(args.json, Failure("AUDIT_TAMPERED", message, REFUSED, metadata))
    return REFUSED


def _of_appliance(args: argparse.Namespace) -> dict[str, Any]:
    from appliance.client.admin import AdminClient
    from appliance.protos import admin_pb2

    if args.head or args.key:
        raise UsageError("--head and --key go with --file")
    with AdminClient(args.home) as admin:
        return plain(admin.audit.VerifyAudit(admin_pb2.VerifyAuditRequest()))


def _of_files(args: argparse.Namespace) -> dict[str, Any]:
    """The verdict of the verifier that stands alone; a process of its own, as all of control's code here."""
    if not args.key:
        raise UsageError("--file needs --key, the public key of the log; keep a copy of it apart from the log")
    for path in (args.file, args.key):
        if not path.is_file():
            raise UsageError(f"no such file: {path}")
    files = (args.file, args.head or args.file.with_suffix(".head"), args.key)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "appliance.control.audit", *map(os.path.abspath, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == BAD_USAGE:
        raise UsageError(done.stderr.strip())
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def _text(verdict: dict[str, Any]) -> str:
    """The verdict for people."""
    lines = [f"records       {verdict['size']:,}"]
    if verdict["intact"]:
        lines += [
            f"root          {verdict['root']}",
            f"open intents  {verdict['open_intents']:,}",
            "verdict       intact",
        ]
        return "\n".join(lines)
    if verdict["first_bad_sequence"]:
        lines.append(f"first bad     {verdict['first_bad_sequence']:,}")
    return "\n".join([*lines, f"verdict       NOT INTACT: {verdict['reason']}"])


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 1_000_000:
        raise argparse.ArgumentTypeError("0 to 1,000,000 records")
    return count
