"""The dashboard: deployments with their engines' counters, tenants with their tokens, and what needs attention."""

from collections.abc import Iterator

from admin_tui.cells import Cell, Column, Fact, Row, Tone
from admin_tui.state import State
from admin_tui.views.figures import UNKNOWN, days_until, number, rate, share, short
from appliance.protos import admin_pb2

DEPLOYMENTS = (
    Column("DEPLOYMENT", 11, grows=2, ends=True),
    Column("STATE", 15),
    Column("MODEL", 22, grows=2, from_width=108),
    Column("RUNS AS", 12, grows=3),
    Column("RUN", 4, right=True),
    Column("WAIT", 4, right=True),
    Column("KV", 4, right=True),
    Column("TOK/S", 6, right=True),
    Column("HIT", 4, right=True),
    Column("PREEMPT", 7, right=True),
)
TENANTS = (
    Column("TENANT", 19, grows=2, ends=True),
    Column("STATE", 14),
    Column("REQUESTS", 10, right=True),
    Column("SPENT", 9, right=True),
    Column("RESERVED", 8, right=True),
    Column("MODELS", 12, grows=3),
)
ALERTS = (Column("ALERTS", 6), Column("", 16, grows=1, ends=True), Column("", 40, grows=5))
NO_DEPLOYMENTS = "no deployments yet: cloister model load MODEL --as NAME"
NO_TENANTS = "no tenants yet: cloister tenant add NAME --models ALIAS"
NO_ALERTS = "none"
_STATES = {
    "ready": Tone.OK,
    "failed": Tone.CRIT,
    "restarting": Tone.WARN,
    "loading": Tone.WARN,
    "draining": Tone.WARN,
}
_WORDS = {Tone.OK: "OK", Tone.WARN: "WARN", Tone.CRIT: "CRIT"}
_SHORT = {"float32": "f32", "bfloat16": "bf16", "deterministic": "det"}
_KV_FULL = 0.95
_EXPIRY_DAYS = 14


def levelled(tone: Tone, text: str) -> Cell:
    """OK, WARN or CRIT in words before the text, and in colour."""
    return Cell(f"{_WORDS[tone]} {text}", tone, {Tone.CRIT: 0.0, Tone.WARN: 1.0}.get(tone, 2.0))


def state_of(deployment: admin_pb2.Deployment) -> Cell:
    """Its state with its level."""
    return levelled(_STATES.get(deployment.state, Tone.WARN), deployment.state)


def deployments(state: State) -> tuple[Row, ...]:
    """One row each, by name."""
    found = state.status.deployments if state.status else ()
    return tuple(Row(d.name, _deployment(state, d)) for d in found)


def tenants(state: State) -> tuple[Row, ...]:
    """One row each, by name."""
    return tuple(Row(t.name, _tenant(t)) for t in state.tenants or ())


def used_pages(engine: admin_pb2.EngineCounters) -> int:
    """KV pages that requests own."""
    return max(0, engine.blocks_total - engine.blocks_free - engine.blocks_cached)


def alerts(state: State) -> tuple[Row, ...]:
    """What needs attention, the worst first."""
    found = [*_system_alerts(state), *_deployment_alerts(state), *_tenant_alerts(state)]
    rows = [Row(f"{subject}/{text}", (_level(tone), Cell(subject), Cell(text))) for tone, subject, text in found]
    return tuple(sorted(rows, key=lambda row: row.cells[0].order or 0.0))


def deployment_detail(state: State, name: str) -> tuple[Fact, ...]:
    """Everything about one deployment."""
    found = next((d for d in (state.status.deployments if state.status else ()) if d.name == name), None)
    if found is None:
        return ()
    facts: list[Fact] = [
        ("deployment", found.name, Tone.STRONG),
        ("state", state_of(found).text, state_of(found).tone),
        *([(found.reason, found.message, Tone.CRIT)] if found.reason else []),
        *(_engine(state, found) if found.HasField("engine") else ()),
        ("model", found.model_version, Tone.PLAIN),
        ("digest", found.model_digest, Tone.PLAIN),
        ("runs as", found.runs_as or "-", Tone.PLAIN),
        ("worker", _worker(found), Tone.PLAIN),
        ("context", f"{found.max_context_tokens:,} tokens" if found.max_context_tokens else "-", Tone.PLAIN),
        ("asked for", _options(found.options), Tone.PLAIN),
    ]
    return tuple(facts)


def alert_detail(state: State, name: str) -> tuple[Fact, ...]:
    """An alert, whole."""
    for row in alerts(state):
        if row.id == name:
            level, subject, text = row.cells
            return ((level.text, subject.text, level.tone), ("", text.text, Tone.PLAIN))
    return ()


def _deployment(state: State, found: admin_pb2.Deployment) -> tuple[Cell, ...]:
    head = (
        Cell(found.name, Tone.STRONG), state_of(found), Cell(found.model_version),
        Cell(_short_runs_as(found.runs_as)) if found.runs_as else UNKNOWN,
    )  # fmt: skip
    if not found.HasField("engine"):
        return (*head, *(UNKNOWN for _ in range(6)))
    engine = found.engine
    read = engine.tokens_cached + engine.tokens_prefilled
    waits = Tone.WARN if engine.waiting else Tone.PLAIN
    full = Tone.WARN if _kv_full(engine) else Tone.PLAIN
    return (
        *head,
        number(engine.running),
        number(engine.waiting, waits),
        share(used_pages(engine), engine.blocks_total, full),
        rate(state.tokens_per_second(found.name)),
        share(engine.tokens_cached, read),
        number(engine.preemptions),
    )


def _short_runs_as(runs_as: str) -> str:
    """Backend, dtype and mode in the few cells there are; the detail has the words."""
    return " ".join(_SHORT.get(word, word) for word in runs_as.split(" "))


def _tenant(tenant: admin_pb2.Tenant) -> tuple[Cell, ...]:
    return (
        Cell(tenant.name, Tone.STRONG),
        tenant_state(tenant),
        requests(tenant),
        number(tenant.tokens_used),
        number(tenant.tokens_reserved),
        Cell(", ".join(tenant.models)) if tenant.models else Cell("none", Tone.DIM),
    )


def tenant_state(tenant: admin_pb2.Tenant) -> Cell:
    """May it call?"""
    return levelled(Tone.WARN, "suspended") if tenant.suspended else levelled(Tone.OK, "active")


def requests(tenant: admin_pb2.Tenant) -> Cell:
    """Requests open, of those it may have open at once."""
    full = tenant.requests_open >= tenant.max_concurrent
    text = f"{short(tenant.requests_open)}/{short(tenant.max_concurrent)}"
    return Cell(text, Tone.WARN if full else Tone.PLAIN, float(tenant.requests_open))


def _kv_full(engine: admin_pb2.EngineCounters) -> bool:
    return used_pages(engine) > _KV_FULL * engine.blocks_total


def _level(tone: Tone) -> Cell:
    return Cell(_WORDS[tone], tone, {Tone.CRIT: 0.0, Tone.WARN: 1.0}.get(tone, 2.0))


def _system_alerts(state: State) -> Iterator[tuple[Tone, str, str]]:
    if state.trouble is not None:
        since = state.heard.strftime("what is shown is of %H:%M:%SZ") if state.heard else "nothing was heard yet"
        yield Tone.CRIT, "control", f"does not answer: {since}"
    status = state.status
    if status is None:
        return
    if status.audit_blocked:
        yield Tone.CRIT, "audit log", f"takes no records, so no request runs: {status.audit_blocked}"
    if not status.gateway_address:
        yield Tone.CRIT, "gateway", "not up: no client is answered"
    for peer in status.peers:
        if not peer.connected:
            tone = Tone.WARN if peer.name == "importer" else Tone.CRIT
            yield tone, peer.name, "does not answer control; its log is in the home's logs/"
    if state.verdict is not None and not state.verdict.intact:
        yield Tone.CRIT, "audit log", f"NOT INTACT: {state.verdict.reason}: {state.verdict.message}"


def _deployment_alerts(state: State) -> Iterator[tuple[Tone, str, str]]:
    for found in state.status.deployments if state.status else ():
        if found.reason or found.state in ("failed", "restarting"):
            tone = Tone.CRIT if found.state == "failed" else Tone.WARN
            why = ": ".join(part for part in (found.reason, found.message) if part)
            yield tone, found.name, f"{found.state}: {why}" if why else found.state
        if found.HasField("engine") and found.engine.waiting and _kv_full(found.engine):
            yield Tone.WARN, found.name, f"KV cache full, {found.engine.waiting:,} requests wait"


def _tenant_alerts(state: State) -> Iterator[tuple[Tone, str, str]]:
    for tenant in state.tenants or ():
        if tenant.suspended:
            yield Tone.WARN, tenant.name, "suspended: its requests are refused"
        elif tenant.requests_open >= tenant.max_concurrent:
            yield Tone.WARN, tenant.name, f"at its limit of {tenant.max_concurrent:,} requests: more are refused"
    if state.heard is None:
        return
    for key in state.keys or ():
        days = days_until(key.expires_at, state.heard)
        if key.state == "active" and days < _EXPIRY_DAYS:
            yield Tone.WARN, key.tenant, f"key {key.key_id} of {key.application} expires in {max(0, days)} days"


def _worker(found: admin_pb2.Deployment) -> str:
    pid = f"process {found.worker_pid}" if found.worker_pid else "none"
    return f"{pid}, started again {found.restarts:,} times" if found.restarts else pid


def _options(options: admin_pb2.DeploymentOptions) -> str:
    given = [f"{f.name} {v if f.name != 'deterministic' else ''}".strip() for f, v in options.ListFields()]
    return ", ".join(given) or "every default"


def _engine(state: State, found: admin_pb2.Deployment) -> tuple[Fact, ...]:
    engine = found.engine
    speed = rate(state.tokens_per_second(found.name)).text
    pages = (
        f"{used_pages(engine):,} in use, {engine.blocks_cached:,} kept for a prefix, {engine.blocks_free:,} free"
    )
    facts = (
        ("requests", f"{engine.running:,} running, {engine.waiting:,} waiting"),
        ("KV pages", f"{pages} of {engine.blocks_total:,}"),
        ("generated", f"{short(engine.tokens_generated)} tokens, {speed} per second, {short(engine.steps)} steps"),
        (
            "prompts",
            f"{short(engine.tokens_prefilled)} tokens computed, {short(engine.tokens_cached)} from the cache",
        ),
        ("preempted", f"{engine.preemptions:,} times, {short(engine.tokens_recomputed)} tokens computed again"),
    )
    return tuple((label, text, Tone.PLAIN) for label, text in facts)
