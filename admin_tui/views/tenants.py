"""The tenants: limits, tokens, models, and the keys of their applications."""

from collections.abc import Iterator

from admin_tui.cells import Cell, Column, Fact, Row, Tone
from admin_tui.state import State
from admin_tui.views.dashboard import NO_TENANTS, requests, tenant_state
from admin_tui.views.figures import days_until, moment, number, short
from appliance.protos import admin_pb2

COLUMNS = (
    Column("TENANT", 14, grows=2, ends=True),
    Column("STATE", 14),
    Column("REQUESTS", 10, right=True),
    Column("WEIGHT", 6, right=True),
    Column("SPENT", 8, right=True),
    Column("RESERVED", 8, right=True),
    Column("KEYS", 4, right=True),
    Column("MODELS", 8, grows=3),
    Column("ADDED", 16, from_width=104),
)
EMPTY = NO_TENANTS
_LEVELS = {"active": Tone.OK, "expired": Tone.WARN, "revoked": Tone.DIM}


def rows(state: State) -> tuple[Row, ...]:
    """One row each, by name."""
    return tuple(Row(t.name, _cells(state, t)) for t in state.tenants or ())


def detail(state: State, name: str) -> tuple[Fact, ...]:
    """Limits, tokens and models of one tenant, then its keys; a key's secret is not to be had."""
    found = next((t for t in state.tenants or () if t.name == name), None)
    if found is None:
        return ()
    facts: list[Fact] = [
        ("tenant", found.name, Tone.STRONG),
        ("state", tenant_state(found).text, tenant_state(found).tone),
        (
            "limits",
            f"{found.max_concurrent:,} requests at once ({found.requests_open:,} now), weight {found.weight}",
            Tone.PLAIN,
        ),
        ("tokens", f"{found.tokens_used:,} spent + {found.tokens_reserved:,} reserved", Tone.PLAIN),
        (
            "models",
            ", ".join(found.models) or f"none: cloister tenant set {found.name} --models ALIAS",
            Tone.PLAIN,
        ),
        ("added", moment(found.created_at), Tone.PLAIN),
    ]
    keys = [_key(state, key) for key in _keys(state, found)]
    none: Fact = ("keys", f"none: cloister key issue --tenant {found.name} --app NAME --out DIR", Tone.PLAIN)
    return (*facts, *(keys or [none]))


def summary(state: State) -> str:
    """All tenants in a line."""
    found = state.tenants
    if found is None:
        return ""
    spent, reserved = sum(t.tokens_used for t in found), sum(t.tokens_reserved for t in found)
    open_now = sum(t.requests_open for t in found)
    noun = "tenant" if len(found) == 1 else "tenants"
    tokens = f"{short(spent)} tokens spent + {short(reserved)} reserved"
    return f"{len(found):,} {noun}, {short(open_now)} requests open, {tokens}"


def _cells(state: State, tenant: admin_pb2.Tenant) -> tuple[Cell, ...]:
    active = sum(1 for key in _keys(state, tenant) if key.state == "active")
    return (
        Cell(tenant.name, Tone.STRONG),
        tenant_state(tenant),
        requests(tenant),
        number(tenant.weight),
        number(tenant.tokens_used),
        number(tenant.tokens_reserved),
        number(active) if state.keys is not None else Cell("-", Tone.DIM),
        Cell(", ".join(tenant.models)) if tenant.models else Cell("none", Tone.DIM),
        Cell(moment(tenant.created_at), order=float(tenant.created_at.seconds)),
    )


def _keys(state: State, tenant: admin_pb2.Tenant) -> Iterator[admin_pb2.Key]:
    return (key for key in state.keys or () if key.tenant == tenant.name)


def _key(state: State, key: admin_pb2.Key) -> Fact:
    when = f"{'expires' if key.state == 'active' else 'expiry'} {moment(key.expires_at, '%Y-%m-%d')}"
    tone = _LEVELS.get(key.state, Tone.WARN)
    if key.state == "active" and state.heard is not None:
        days = days_until(key.expires_at, state.heard)
        when += f" (in {days} days)"
        tone = Tone.WARN if days < 14 else tone
    return (f"key {key.state}", f"{key.application}  {key.key_id}  {when}", tone)
