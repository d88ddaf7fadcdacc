"""The audit log: one page of records as the server filtered them, a record whole, and the verdict on the log."""

import json
from datetime import UTC, datetime

from admin_tui.cells import Cell, Column, Fact, Row, Tone
from admin_tui.state import AuditPage, State
from admin_tui.views.figures import moment
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

COLUMNS = (
    Column("SEQ", 7, right=True),
    Column("TIME (UTC)", 14),
    Column("KIND", 17),
    Column("RESULT", 10),
    Column("WHO", 14, grows=2, ends=True),
    Column("WHAT", 12, grows=4),
    Column("REQUEST", 36, grows=2, from_width=132),
)
EMPTY = "no records match"
PAGE_SIZE = 100
_BAD = {"deny", "failed", "rejected", "unknown", "abandoned"}
_FIELDS = {
    "kind": "kind_prefix",
    "tenant": "tenant",
    "actor": "actor",
    "decision": "decision",
    "request": "request_id",
}
_TIMES = ("since", "until")
_NAMED = ("name", "tenant", "alias", "key_id", "model_version", "path")
FILTER_HELP = (
    "kind:operator. tenant:NAME actor:TEXT decision:deny request:ID since:2026-11-21 until:2026-11-21T14:00"
)


def rows(state: State) -> tuple[Row, ...]:
    """The page, newest first."""
    records = state.audit.answer.records if state.audit else ()
    return tuple(Row(str(r.sequence), _cells(r)) for r in records)


def detail(state: State, sequence: str) -> tuple[Fact, ...]:
    """One record, its canonical body as JSON laid out for reading."""
    records = state.audit.answer.records if state.audit else ()
    found = next((r for r in records if str(r.sequence) == sequence), None)
    if found is None:
        return ()
    facts: list[Fact] = [
        ("record", f"{found.sequence:,}  {found.kind}  {found.phase}  {found.decision}", Tone.STRONG),
        ("time", moment(found.time, "%Y-%m-%d %H:%M:%S.%f UTC"), Tone.PLAIN),
        ("actor", found.actor or "-", Tone.PLAIN),
        ("tenant", found.tenant or "-", Tone.PLAIN),
        ("request", found.request_id or "-", Tone.PLAIN),
        ("leaf hash", found.leaf_hash.hex(), Tone.PLAIN),
    ]
    body = [("", line, Tone.PLAIN) for line in _body(found.body_json)]
    return (*facts, ("canonical", "the record as it is hashed:", Tone.DIM), *body)


def filter_of(text: str) -> admin_pb2.QueryAuditRequest:
    """What was typed as a question to the server; a bare word is the beginning of a kind.

    Raises:
        CloisterError: BAD_FILTER, a field that there is not, or a time that is none.
    """
    request = admin_pb2.QueryAuditRequest(limit=PAGE_SIZE)
    for word in text.split():
        name, colon, value = word.partition(":")
        if not colon:
            name, value = "kind", word
        if name in _FIELDS:
            setattr(request, _FIELDS[name], value)
        elif name in _TIMES:
            getattr(request, name).FromDatetime(_instant(name, value))
        else:
            raise CloisterError("BAD_FILTER", f"no field {name}: kind tenant actor decision request since until")
    return request


def filter_text(request: admin_pb2.QueryAuditRequest) -> str:
    """The filter as one would type it; empty when everything is shown."""
    words = [f"{name}:{getattr(request, field)}" for name, field in _FIELDS.items() if getattr(request, field)]
    times = {name: getattr(request, name) for name in _TIMES}
    words += [f"{name}:{moment(stamp, '%Y-%m-%dT%H:%M:%S')}" for name, stamp in times.items() if stamp.seconds]
    return " ".join(words)


def summary(state: State) -> tuple[str, Tone]:
    """The head of the log or the verdict on it, and where the page stands."""
    if state.verifying:
        return "VERIFYING every record against the signed head ...", Tone.WARN
    verdict = state.verdict
    if verdict is None:
        return _head(state), Tone.DIM
    if verdict.intact:
        root = verdict.root.hex()[:16]
        return f"OK INTACT 1..{verdict.size:,}  head {root}  open intents {verdict.open_intents:,}", Tone.OK
    where = f" at record {verdict.first_bad_sequence:,}" if verdict.first_bad_sequence else ""
    return f"CRIT NOT INTACT{where}: {verdict.reason}: {verdict.message}", Tone.CRIT


def position(state: State) -> str:
    """Which records these are, of how many, and how many came since."""
    page = state.audit
    if page is None:
        return "no records were read yet; r asks"
    size = page.answer.log_size
    shown = [r.sequence for r in page.answer.records]
    span = f"{shown[-1]:,}..{shown[0]:,} of {size:,}" if shown else f"0 of {size:,}"
    grown = (state.status.audit_size if state.status else 0) - size
    newer = f"  {grown:,} newer: r" if grown > 0 else ""
    words = filter_text(page.request)
    return f"{span}" + (f"  {words}" if words else "") + newer


def older(page: AuditPage) -> tuple[admin_pb2.QueryAuditRequest, tuple[int, ...]] | None:
    """How to ask for the next page, and the way back; None when this is the last."""
    if not page.answer.next_before_sequence:
        return None
    request = admin_pb2.QueryAuditRequest()
    request.CopyFrom(page.request)
    request.before_sequence = page.answer.next_before_sequence
    return request, (*page.newer, page.request.before_sequence)


def newer(page: AuditPage) -> tuple[admin_pb2.QueryAuditRequest, tuple[int, ...]] | None:
    """How to ask for the page before; None when this is the first."""
    if not page.newer:
        return None
    request = admin_pb2.QueryAuditRequest()
    request.CopyFrom(page.request)
    request.before_sequence = page.newer[-1]
    return request, page.newer[:-1]


def _head(state: State) -> str:
    if state.status is None:
        return ""
    root = state.status.audit_root.hex()[:16]
    return f"{state.status.audit_size:,} records, root {root}, not verified in this console: v"


def _cells(record: admin_pb2.TailAuditResponse) -> tuple[Cell, ...]:
    tone = Tone.WARN if record.decision in _BAD else Tone.PLAIN
    return (
        Cell(f"{record.sequence}", order=float(record.sequence)),
        Cell(moment(record.time, "%m-%d %H:%M:%S"), order=record.time.seconds + record.time.nanos / 1e9),
        Cell(record.kind, Tone.STRONG),
        Cell(_result(record), tone),
        Cell(_who(record) or "-"),
        Cell(what(record.body_json) or "-"),
        Cell(record.request_id or "-"),
    )


def what(canonical: str) -> str:
    """What a record is about: the method and the name it was given, or else the model; empty where neither is."""
    try:
        facts = json.loads(canonical)["facts"]
        given = facts.get("arguments", {})
        words = [facts.get("method", "").rpartition("/")[2], *(given.get(name, "") for name in _NAMED)]
        return " ".join(str(word) for word in words if word) or str(
            facts.get("model") or facts.get("reason") or ""
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""  # a record whose body was changed: the detail shows it as it is


def _result(record: admin_pb2.TailAuditResponse) -> str:
    """How it ended; of what has just begun, that it did."""
    return "begun" if record.phase == "intent" and record.decision == "allow" else record.decision or "-"


def _who(record: admin_pb2.TailAuditResponse) -> str:
    """An operator or a process by name; an application, whose name ends its identity, after its tenant."""
    actor = record.actor.rpartition("/")[2] if record.actor.startswith("spiffe://") else record.actor
    return "/".join(word for word in (record.tenant, actor) if word)


def _body(canonical: str) -> list[str]:
    """The body over several lines; as it is when it is no JSON."""
    try:
        return json.dumps(json.loads(canonical), indent=1, ensure_ascii=False).splitlines()
    except (ValueError, RecursionError):
        return [canonical]


def _instant(name: str, value: str) -> datetime:
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise CloisterError("BAD_FILTER", f"{name}: {value} is no date such as 2026-11-21T14:00") from None
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
