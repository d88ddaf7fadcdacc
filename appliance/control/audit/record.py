"""One audit record: what callers hand in, the canonical bytes that are hashed, and what is read back.

The body is canonical JSON as RFC 8785 writes it (keys sorted, no blanks, shortest escapes, UTF-8), with two
narrowings: no floats, and keys in ASCII. Integers are 64-bit, so a reader in JavaScript must not parse them as
doubles. A 16-byte random nonce inside keeps a leaf hash from being guessed back into a body.

Source: RFC 8785 (JCS); RFC 9162, section 2.1.1 (leaf hash).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Literal, NamedTuple, TypeAlias

Json: TypeAlias = "bool | int | str | Sequence[Json] | Mapping[str, Json] | None"
Phase = Literal["intent", "outcome", "event"]

VERSION = 1
MAX_FACTS = 64 * 1024
_MAX_TEXT = 1024
_MAX_DEPTH = 8
_INT64 = 1 << 63
_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]{1,128}")

quote = encode_basestring
"""Text as a JSON string with the shortest escapes, in quotes."""


class AuditRecordError(ValueError):
    """A record that cannot be written: a field out of bounds, or a fact that JSON without floats cannot say."""

    code = "AUDIT_RECORD_INVALID"


@dataclass(frozen=True, slots=True)
class Record:
    """What happened, as the caller knows it; place and time are added by the writer.

    Attributes:
        kind: what sort of thing, dotted lower case (`inference.generate`).
        phase: `intent` before an effect, `outcome` after it, `event` for what has no two halves.
        actor: who did it: certificate identity, operator, or a process of the appliance.
        decision: allow, deny, or what came of it.
        request_id: joins intent and outcome; those two phases need one.
        tenant: whose; empty for the appliance's own.
        facts: further values; never prompt text, never a secret.
    """

    kind: str
    phase: Phase
    actor: str
    decision: str
    request_id: str = ""
    tenant: str = ""
    facts: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a durable record stands.

    Attributes:
        sequence: place in the log, from 1; the leaf index of RFC 9162 is one less.
        leaf_hash: RFC 9162 leaf hash of its body.
    """

    sequence: int
    leaf_hash: bytes


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as the database holds it, with the columns of table `rec` under their full names."""

    sequence: int
    utc_ns: int
    mono_ns: int
    boot: str
    clock: str
    request_id: str
    kind: str
    phase: str
    tenant: str
    actor: str
    decision: str
    body: bytes
    leaf_hash: bytes
    chain_hash: bytes

    @property
    def facts(self) -> dict[str, Json]:
        """The facts, parsed from the body."""
        facts: dict[str, Json] = json.loads(self.body)["facts"]
        return facts


class Stamp(NamedTuple):
    """When: wall clock and monotonic clock in nanoseconds, the boot they belong to, and the wall clock's state."""

    utc_ns: int
    mono_ns: int
    boot: str
    clock: str


class Draft(NamedTuple):
    """A record checked and half encoded, ready for the writer."""

    record: Record
    facts: str


def draft(record: Record) -> Draft:
    """Check a record and encode its facts, in the caller's thread so that the caller sees what is wrong.

    Raises:
        AuditRecordError: a field is out of its bounds.
    """
    _check_fields(record)
    _check_fact(record.facts, "facts", 0)
    facts = json.dumps(record.facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    _check_text(facts, "facts", MAX_FACTS)
    return Draft(record, facts)


class Frame(NamedTuple):
    """The parts of a body that repeat from record to record, quoted; numbers, request id and facts go between."""

    before_facts: str
    before_mono: str
    before_request: str
    before_utc: str


@lru_cache(maxsize=1024)
def frame(boot: str, clock: str, kind: str, phase: str, tenant: str, actor: str, decision: str) -> Frame:
    """The frame of all records that share these columns."""
    return Frame(
        f'{{"actor":{quote(actor)},"boot":{quote(boot)},"clock":{quote(clock)},"decision":{quote(decision)},"facts":',
        f',"kind":{quote(kind)},"mono_ns":',
        f'","phase":{quote(phase)},"request_id":',
        f',"tenant":{quote(tenant)},"utc_ns":',
    )


def encode(item: Draft, sequence: int, stamp: Stamp, nonce: bytes) -> bytes:
    """The canonical body of record number `sequence`."""
    r = item.record
    before, mono, request, utc = frame(stamp.boot, stamp.clock, r.kind, r.phase, r.tenant, r.actor, r.decision)
    return (
        f'{before}{item.facts}{mono}{stamp.mono_ns},"nonce":"{nonce.hex()}'
        f'{request}{quote(r.request_id)},"seq":{sequence}{utc}{stamp.utc_ns},"v":{VERSION}}}'
    ).encode()


def leaf_hash(body: bytes) -> bytes:
    """RFC 9162 leaf hash: SHA-256(0x00 || body)."""
    return hashlib.sha256(b"\x00" + body).digest()


def chain_hash(previous: bytes, leaf: bytes) -> bytes:
    """The cheap chain beside the tree: SHA-256(0x02 || previous || leaf)."""
    return hashlib.sha256(b"\x02" + previous + leaf).digest()


def _check_fields(record: Record) -> None:
    if not _KIND.fullmatch(record.kind):
        raise AuditRecordError("kind must be dotted lower case, at most 64 characters")
    if record.phase not in ("intent", "outcome", "event"):
        raise AuditRecordError("phase must be intent, outcome or event")
    if record.phase != "event" and not record.request_id:
        raise AuditRecordError(f"an {record.phase} needs the request_id that joins it to its other half")
    if not record.actor or not record.decision:
        raise AuditRecordError("actor and decision must not be empty")
    for name in ("actor", "decision", "request_id", "tenant"):
        _check_text(getattr(record, name), name, _MAX_TEXT)


def _check_text(text: str, name: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise AuditRecordError(f"{name} holds half a surrogate pair; it is not text") from None
    if size > limit:
        raise AuditRecordError(f"{name} has {size} bytes, more than {limit}")


def _check_fact(value: object, path: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise AuditRecordError(f"{path} is nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if not -_INT64 <= value < _INT64:
            raise AuditRecordError(f"{path} does not fit 64 bits")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise AuditRecordError(f"{path} has a key that is not 1 to 128 printable ASCII characters")
            _check_fact(inner, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_fact(inner, f"{path}[]", depth + 1)
    else:
        raise AuditRecordError(f"{path} is a {type(value).__name__}; facts are text, integers, booleans and null")
