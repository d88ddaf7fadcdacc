"""`cloister audit`: read and verify the audit log."""

import argparse
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.cli.arguments import whole
from appliance.cli.failure import BAD_USAGE, REFUSED, Failure, UsageError
from appliance.cli.output import emit, emit_error, emit_line, plain, printable

if TYPE_CHECKING:
    from appliance.protos import admin_pb2

_PAGE = 200
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister audit`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    tail = verbs.add_parser("tail", help="the newest records, oldest first; with --json one object a line")
    tail.add_argument("-n", type=_count, default=20, dest="count", metavar="N", help="how many (default 20)")
    tail.add_argument("--follow", action="store_true", help="wait for new ones until interrupted")
    tail.set_defaults(run=_tail)
    _add_query(verbs.add_parser("query", help="records that match, newest first; with --json one object a line"))
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


def _add_query(query: argparse.ArgumentParser) -> None:
    query.add_argument("--kind", default="", metavar="PREFIX", help="kinds that begin so, such as operator.")
    query.add_argument("--tenant", default="", metavar="NAME", help="records of this tenant")
    query.add_argument("--actor", default="", metavar="TEXT", help="actors that hold this, whatever the case")
    query.add_argument("--decision", default="", metavar="WORD", help="allow, deny, or what came of it")
    query.add_argument(
        "--request-id", default="", metavar="ID", help="TENANT/UUID of a request, or an action's id"
    )
    query.add_argument(
        "--since", type=_moment, metavar="TIME", help="not before: 2026-05-31, 2026-05-31T12:00Z, 90m"
    )
    query.add_argument(
        "--until", type=_moment, metavar="TIME", help="before; minutes, hours, days ago: 90m, 24h, 7d"
    )
    query.add_argument("-n", type=_count, default=50, dest="count", metavar="N", help="how many (default 50)")
    query.add_argument(
        "--before", type=whole(1, 2**63 - 1), default=0, metavar="SEQ", help="records before this one"
    )
    query.set_defaults(run=_query)


def _query(args: argparse.Namespace) -> int:
    from appliance.client.admin import AdminClient
    from appliance.protos import admin_pb2

    request = admin_pb2.QueryAuditRequest(
        before_sequence=args.before,
        kind_prefix=args.kind,
        tenant=args.tenant,
        actor=args.actor,
        decision=args.decision,
        request_id=args.request_id,
    )
    for field in ("since", "until"):
        if (moment := getattr(args, field)) is not None:
            getattr(request, field).FromDatetime(moment)
    left = args.count
    with AdminClient(args.home) as admin:
        while left > 0:
            request.limit = min(left, _PAGE)
            page = admin.audit.QueryAudit(request)
            for record in page.records:
                emit_line(args, _value(record), _line(record))
            left -= len(page.records)
            request.before_sequence = page.next_before_sequence
            if not page.next_before_sequence:
                break
    return 0


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


def _moment(text: str) -> datetime:
    """A point in time: RFC 3339, a date, or so long ago; without a zone it is UTC."""
    ago = re.fullmatch(r"(\d{1,6})([mhd])", text)
    try:
        if ago:
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        wanted = "a time such as 2026-05-31, 2026-05-31T12:00Z or 90m, 24h, 7d for so long ago"
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted}") from None


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 1_000_000:
        raise argparse.ArgumentTypeError("0 to 1,000,000 records")
    return count
