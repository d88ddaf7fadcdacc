"""What control writes into the audit log: one function per kind of record; nothing else decides on their facts.

kind                phases           request id      decision                facts
appliance.genesis   event                            sealed                  site, profile, operator, fingerprints
appliance.control   event                            started, stopped        leases kept or left at that moment
inference.request   intent, outcome  TENANT/UUID     allow; how it ended     key, model, sizes, parameters; usage
inference.refused   event            TENANT/UUID, ""  deny                   method, reason, certificate
operator.login      event                            allow, deny             uid, login uid, reason
operator.refused    event                            deny                    method, reason
operator.read       event                            allow                   method, arguments
operator.change     intent, outcome  action          allow; done or failed   method, arguments; results, reason
bundle.state        event            IMPORT/N        the import's state      outbox position, version, digest
version.state       event            UUID, DIGEST/TIME  approved, active, retired,  version, digest, why
                                                     revoked
model.activation    event            UUID            active, returned        version, canaries, reason
model.removal       event            N-TIME          removed                 outbox position, version, digest
model.derived       event            UUID            recorded, refused,      digest, layout, digest and size of
                                                     removed, replaced       the file
store.damage        event            N-TIME          found                   outbox position, file, finding
store.repair        event            N-TIME          repaired                outbox position, file
trust.change        event            N-TIME          accepted                outbox position, what changed

An outcome `abandoned` was not told by a gateway: control closed the lease. Its fact `charged` says that the tokens
in it are those `reserved` (prompt and max_tokens; nobody knows how many were used) or that no token can have left
(`nothing`).
A prompt appears only as an HMAC of its digest under a key that stays on the box. API keys and sessions never do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from appliance.control.admission.reservations import ABANDONED, NEVER_STARTED, Ending, Reservation
from appliance.control.audit.record import Json, Record, StoredRecord
from appliance.policy import POLICY_VERSION
from bundles.protos import importer_pb2

CONTROL = "control"
REQUEST = "inference.request"
CHANGE = "operator.change"
VERSION_STATE = "version.state"
DERIVED = "model.derived"
ACTIVATION = "model.activation"
TRUST = "trust"
IMPORT = "import"
"""The importer's event that is an import's new state; the others are no import's."""

_OF_THE_STORE = {
    "removal": ("model.removal", "removed"),
    "damage": ("store.damage", "found"),
    "repair": ("store.repair", "repaired"),
    TRUST: ("trust.change", "accepted"),
}

Facts = Mapping[str, Json]


@dataclass(frozen=True)
class Admitted:
    """What the intent of a request says besides its reservation."""

    identity: str
    certificate_sha256: bytes
    method: str
    prompt_mac: str
    parameters: Mapping[str, str]


def request_intent(reservation: Reservation, admitted: Admitted) -> Record:
    """A request was admitted; no token has left."""
    return Record(
        kind=REQUEST,
        phase="intent",
        actor=admitted.identity,
        decision="allow",
        request_id=_request_id(reservation.tenant, reservation.request_id),
        tenant=reservation.tenant,
        facts={
            "lease": reservation.lease,
            "method": admitted.method,
            "certificate": admitted.certificate_sha256.hex(),
            "key_id": reservation.key_id,
            "policy": POLICY_VERSION,
            "model": reservation.model,
            "model_digest": reservation.model_digest,
            "prompt_tokens": reservation.size.prompt_tokens,
            "max_tokens": reservation.size.max_tokens,
            "prompt_mac": admitted.prompt_mac,
            "parameters": dict(admitted.parameters),
        },
    )


def request_outcome(reservation: Reservation, actor: str, ending: Ending) -> Record:
    """A request ended."""
    return Record(
        kind=REQUEST,
        phase="outcome",
        actor=actor,
        decision=ending.outcome,
        request_id=_request_id(reservation.tenant, reservation.request_id),
        tenant=reservation.tenant,
        facts={"lease": reservation.lease, **_usage(ending)},
    )


def closing(intent: StoredRecord, ending: Ending | None, reason: str) -> Record:
    """The outcome of an intent that a control before this one left open; `ending` as the ledger has it."""
    facts: dict[str, Json] = {"closed_because": reason}
    if ending is not None:
        facts |= _usage(ending)
    return Record(
        kind=intent.kind,
        phase="outcome",
        actor=CONTROL,
        decision=ending.outcome if ending else "unknown",
        request_id=intent.request_id,
        tenant=intent.tenant,
        facts=facts,
    )


def request_refused(identity: str, tenant: str, request_id: str, facts: Facts) -> Record:
    """A tenant's request was refused, by control or by the gateway."""
    return Record(
        kind="inference.refused",
        phase="event",
        actor=identity or "unknown",
        decision="deny",
        request_id=_request_id(tenant, request_id) if request_id else "",
        tenant=tenant,
        facts=facts,
    )


def login(operator: str, decision: str, facts: Facts) -> Record:
    """Somebody asked for a session."""
    return Record("operator.login", "event", operator or "unknown", decision, facts=facts)


def operator_event(kind: str, operator: str, decision: str, facts: Facts) -> Record:
    """An operator was refused, or read what is sensitive."""
    return Record(kind, "event", operator or "unknown", decision, facts=facts)


def change_intent(operator: str, action: str, facts: Facts) -> Record:
    """An operator is about to change something."""
    return Record(CHANGE, "intent", operator, "allow", action, facts=facts)


def change_outcome(operator: str, action: str, decision: str, facts: Facts) -> Record:
    """What came of it."""
    return Record(CHANGE, "outcome", operator, decision, action, facts=facts)


def control_event(decision: str, facts: Facts) -> Record:
    """Control started or stopped."""
    return Record("appliance.control", "event", CONTROL, decision, facts=facts)


def importer_event(entry: importer_pb2.ReadOutboxResponse) -> Record:
    """What changed in the importer, as its outbox has it.

    Raises:
        KeyError: an event that this program does not know; it stays in the outbox.
    """
    if entry.event in ("", IMPORT):
        return _import_state(entry)
    kind, decision = _OF_THE_STORE[entry.event]
    facts = {**_outbox_facts(entry), "detail": entry.detail}
    return Record(kind, "event", "importer", decision, f"{entry.sequence}-{entry.utc_ns}", facts=facts)


def approved_by_root(version: importer_pb2.ModelVersion) -> Record:
    """A committed version may run, as the trust root names no custodians who would have to say so.

    One record for each time it is committed, however often its bundle is imported on top.
    """
    facts: dict[str, Json] = {
        "model_version": f"{version.name}@{version.version}",
        "model_digest": version.model_digest,
        "approvals_required": 0,
        "because": "the trust root names no custodians",
    }
    name = f"{version.model_digest}/{version.imported_at}"
    return Record(VERSION_STATE, "event", CONTROL, "approved", name, facts=facts)


def _import_state(entry: importer_pb2.ReadOutboxResponse) -> Record:
    state = importer_pb2.ImportState.Name(entry.state).removeprefix("IMPORT_STATE_").lower()
    facts = {"import_id": entry.import_id, **_outbox_facts(entry)}
    return Record("bundle.state", "event", "importer", state, f"{entry.import_id}/{entry.sequence}", facts=facts)


def _outbox_facts(entry: importer_pb2.ReadOutboxResponse) -> dict[str, Json]:
    return {
        "outbox_sequence": entry.sequence,
        "reason": entry.reason,
        "model_version": entry.model_version,
        "model_digest": entry.model_digest,
        "utc_ns": entry.utc_ns,
    }


def _request_id(tenant: str, request_id: str) -> str:
    """Request ids are the tenants' own; two tenants may well use the same."""
    return f"{tenant}/{request_id}"


def _usage(ending: Ending) -> dict[str, Json]:
    facts: dict[str, Json] = {
        "reason": ending.reason,
        "finish_reason": ending.finish_reason,
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        "duration_ns": ending.duration_ns,
    }
    if ending.outcome == ABANDONED:
        facts["charged"] = "nothing" if ending.reason == NEVER_STARTED else "reserved"
    return facts
