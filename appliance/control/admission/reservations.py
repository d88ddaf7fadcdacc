"""What a request costs, in transactions: reserved before it runs, settled when it ends, never charged twice.

Reserving the most that a request may use, in the same transaction that checks the limits, is what keeps concurrent
requests from all passing one check (the check-then-charge leak of LiteLLM, issue 34732).
"""

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import grpc
from sqlalchemy import Row, bindparam, exists, func, insert, select, update
from sqlalchemy.orm import Session

from appliance.control.admission.tickets import Ticket
from appliance.control.db.models import Base, Request, Tenant, Usage
from appliance.errors import CloisterError

OPEN = "open"
SETTLED = "settled"
MAX_ANSWERS = 8
MAX_INPUTS = 256
ABANDONED = "abandoned"
"""Settled by control, as no gateway did; charged is all that was reserved, the one bound that is known."""
NEVER_STARTED = "NEVER_STARTED"
"""Why an abandoned request is charged nothing: without its intent on record no token may leave."""
_COPIED = ("tenant", "application", "key_id", "request_id", "model", "model_digest")
"""What the ledger takes over from the request."""

# On the way of every request, so built once and without the ORM.
_TABLES = Base.metadata.tables
_TENANT, _KEY, _REQUEST = _TABLES["tenant"].c, _TABLES["api_key"].c, _TABLES["request"].c
_STANDING = select(
    _TENANT.max_concurrent,
    _TENANT.weight,
    _TENANT.suspended,
    select(_KEY.revoked_ns).where(_KEY.key_id == bindparam("key_id")).scalar_subquery().label("revoked_ns"),
    exists()
    .where(_REQUEST.tenant == _TENANT.name, _REQUEST.request_id == bindparam("request_id"))
    .label("repeated"),
    select(func.count())
    .where(_REQUEST.tenant == _TENANT.name, _REQUEST.state == OPEN)
    .scalar_subquery()
    .label("running"),
).where(_TENANT.name == bindparam("tenant"))
_RESERVE = insert(_TABLES["request"])
_CLOSE = (
    update(_TABLES["request"])
    .where(_REQUEST.lease == bindparam("of"), _REQUEST.state == OPEN)
    .values(state=SETTLED, settled_ns=bindparam("now_ns"))
    .returning(*(_REQUEST[name] for name in _COPIED))
)
_CHARGE = (
    update(_TABLES["tenant"])
    .where(_TENANT.name == bindparam("of"))
    .values(tokens_used=_TENANT.tokens_used + bindparam("tokens"))
)
_LEDGER = insert(_TABLES["usage"])


@dataclass(frozen=True)
class Size:
    """Tokens of a prompt, and most tokens of all its answers together.

    With `inputs`, which get a vector or a score each, prompt_tokens are those of all of them, and max_tokens is 0.
    """

    prompt_tokens: int
    max_tokens: int
    answers: int = 1
    inputs: int = 0


@dataclass(frozen=True)
class Ending:
    """How a request ended, and what it used."""

    outcome: str
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    duration_ns: int = 0


@dataclass(frozen=True)
class Reservation:
    """A request that was admitted."""

    lease: str
    tenant: str
    application: str
    key_id: str
    request_id: str
    model: str
    model_digest: str
    weight: int
    size: Size


@dataclass(frozen=True)
class InForce:
    """Open requests of a tenant, and the tokens they may still use."""

    requests: int
    tokens: int


def check_size(size: Size, max_context_tokens: int) -> None:
    """Refuse what cannot fit the model: the prompt and each answer share one context, each input has its own.

    Raises:
        CloisterError: EMPTY_PROMPT, INVALID_MAX_TOKENS, TOO_MANY_ANSWERS, TOO_MANY_INPUTS, CONTEXT_OVERFLOW.
    """
    if size.inputs:
        _check_inputs(size, max_context_tokens)
        return
    if size.answers > MAX_ANSWERS:
        raise CloisterError("TOO_MANY_ANSWERS", f"a request has at most {MAX_ANSWERS} answers")
    if size.prompt_tokens == 0:
        raise CloisterError("EMPTY_PROMPT", "the prompt has no tokens; send some text")
    if size.max_tokens == 0:
        raise CloisterError("INVALID_MAX_TOKENS", "max_tokens is 0; ask for at least one token")
    wanted = size.prompt_tokens + size.max_tokens // size.answers
    if wanted > max_context_tokens:
        raise CloisterError(
            "CONTEXT_OVERFLOW",
            f"prompt and answer want {wanted} tokens and the model holds {max_context_tokens}; shorten one",
            metadata={"tokens": str(wanted), "max_context_tokens": str(max_context_tokens)},
        )


def _check_inputs(size: Size, max_context_tokens: int) -> None:
    if size.inputs > MAX_INPUTS:
        raise CloisterError("TOO_MANY_INPUTS", f"a request has at most {MAX_INPUTS} inputs")
    if size.prompt_tokens < size.inputs:
        raise CloisterError("EMPTY_PROMPT", "an input has no tokens; send some text")
    if size.max_tokens:
        raise CloisterError("INVALID_MAX_TOKENS", "a vector or a score has no tokens, so max_tokens is 0")
    if size.prompt_tokens > size.inputs * max_context_tokens:
        raise CloisterError(
            "CONTEXT_OVERFLOW",
            f"{size.inputs} inputs of {size.prompt_tokens} tokens; the model takes {max_context_tokens} of each",
            metadata={"tokens": str(size.prompt_tokens), "max_context_tokens": str(max_context_tokens)},
        )


def reserve(session: Session, ticket: Ticket, size: Size, lease: str, now_ns: int) -> Reservation:
    """Admit a request: its id is taken, and prompt + max_tokens are reserved under `lease`.

    Raises:
        CloisterError: DUPLICATE_REQUEST_ID, TENANT_CONCURRENCY, or the key or tenant was stopped since Authorize.
    """
    principal = ticket.principal
    asked = {"tenant": principal.tenant, "key_id": principal.key_id, "request_id": ticket.request_id}
    standing = session.execute(_STANDING, asked).one()
    _check_standing(standing)
    row = {
        **asked,
        "lease": lease,
        "gateway_id": ticket.gateway_id,
        "application": principal.application,
        "model": ticket.model,
        "deployment": ticket.deployment,
        "model_digest": ticket.model_digest,
        "prompt_tokens": size.prompt_tokens,
        "max_tokens": size.max_tokens,
        "state": OPEN,
        "admitted_ns": now_ns,
    }
    session.execute(_RESERVE, row)
    return _reservation(lease, ticket, standing.weight, size)


def settle(session: Session, lease: str, ending: Ending, now_ns: int) -> None:
    """Write the ledger row and release the reservation; nothing happens when that was done before."""
    request = session.execute(_CLOSE, {"of": lease, "now_ns": now_ns}).one_or_none()
    if request is None:
        return
    tokens = ending.prompt_tokens + ending.completion_tokens
    session.execute(_CHARGE, {"of": request.tenant, "tokens": tokens})
    row = {**request._mapping, **asdict(ending), "lease": lease, "settled_ns": now_ns}
    session.execute(_LEDGER, row)


def left_open(session: Session) -> list[tuple[Reservation, str]]:
    """Every reservation in force, and the gateway it was given to. For a control that starts."""
    query = select(Request, Tenant.weight).join(Tenant, Tenant.name == Request.tenant).where(Request.state == OPEN)
    return [(_reserved(request, weight), request.gateway_id) for request, weight in session.execute(query)]


def ending_of(session: Session, lease: str) -> Ending | None:
    """How a settled request ended; None when the ledger does not have it."""
    row = session.scalars(select(Usage).where(Usage.lease == lease)).one_or_none()
    if row is None:
        return None
    return Ending(
        row.outcome, row.reason, row.prompt_tokens, row.completion_tokens, row.finish_reason, row.duration_ns
    )


def in_force(session: Session, tenant: str) -> InForce:
    """What a tenant's open requests hold."""
    total = func.coalesce(func.sum(Request.prompt_tokens + Request.max_tokens), 0)
    found = select(func.count(), total).where(Request.tenant == tenant, Request.state == OPEN)
    requests, tokens = session.execute(found).one()
    return InForce(requests, tokens)


def _check_standing(standing: "Row[*tuple[Any, ...]]") -> None:
    """Refuse what a tenant may not have now."""
    if standing.suspended:
        raise CloisterError(
            "TENANT_SUSPENDED", "the tenant was suspended just now", grpc.StatusCode.PERMISSION_DENIED
        )
    if standing.revoked_ns is not None:
        raise CloisterError("KEY_REVOKED", "the API key was revoked just now", grpc.StatusCode.UNAUTHENTICATED)
    if standing.repeated:
        raise CloisterError(
            "DUPLICATE_REQUEST_ID",
            "this request id was used before; use a new one for a new request",
            grpc.StatusCode.ALREADY_EXISTS,
        )
    if standing.running >= standing.max_concurrent:
        raise CloisterError(
            "TENANT_CONCURRENCY",
            f"the tenant already has its {standing.max_concurrent} requests running; wait for one to end",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            {"max_concurrent": str(standing.max_concurrent)},
            retry_after=timedelta(seconds=1),
        )


def _reserved(request: Request, weight: int) -> Reservation:
    return Reservation(
        lease=request.lease,
        tenant=request.tenant,
        application=request.application,
        key_id=request.key_id,
        request_id=request.request_id,
        model=request.model,
        model_digest=request.model_digest,
        weight=weight,
        size=Size(request.prompt_tokens, request.max_tokens),
    )


def _reservation(lease: str, ticket: Ticket, weight: int, size: Size) -> Reservation:
    principal = ticket.principal
    return Reservation(
        lease=lease,
        tenant=principal.tenant,
        application=principal.application,
        key_id=principal.key_id,
        request_id=ticket.request_id,
        model=ticket.model,
        model_digest=ticket.model_digest,
        weight=weight,
        size=size,
    )
