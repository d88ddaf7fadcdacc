"""An appliance that is not there: deterministic answers at the console's port, and faults on demand."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import grpc

from admin_tui.app import ConsoleApp
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

START = datetime(2026, 11, 21, 14, 3, 7, tzinfo=UTC)
DIGEST = "7cceb7f40160" + "0" * 52
GONE = CloisterError("NOT_RUNNING", "no appliance answers at run/admin.sock", grpc.StatusCode.UNAVAILABLE)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds - 1000)


def deployment(name: str = "notes", state: str = "ready", tokens: int = 0) -> admin_pb2.Deployment:
    found = admin_pb2.Deployment(
        name=name, model_version="demo-notes-s@1.0.1", model_digest=DIGEST, state=state, worker_pid=4242,
        runs_as="cpu float32 deterministic", max_context_tokens=1024,
        engine=admin_pb2.EngineCounters(
            waiting=0, running=3, blocks_total=200, blocks_free=120, blocks_cached=40, steps=900,
            tokens_generated=tokens, tokens_prefilled=600, tokens_cached=200, preemptions=2, tokens_recomputed=64,
        ),
    )  # fmt: skip
    if state != "ready":
        found.ClearField("engine")
    return found


def record(
    sequence: int, kind: str = "operator.read", actor: str = "alice", **more: str
) -> admin_pb2.TailAuditResponse:
    found = admin_pb2.TailAuditResponse(
        sequence=sequence, kind=kind, phase="event", actor=actor, decision=more.pop("decision", "allow"),
        body_json='{"facts":{"method":"QueryAudit"},"v":1}', leaf_hash=bytes(32), **more,
    )  # fmt: skip
    found.time.FromDatetime(START + timedelta(seconds=sequence))
    return found


class FakePort:
    """What the console asks for; a test changes the attributes.

    Attributes:
        failure: raised by every call while it is set.
        failures: raised by the call of that name.
        calls: names of the calls made.
        queries: what the log was asked for.
        progress: what an import says; it waits for `go` before the last.
    """

    def __init__(self) -> None:
        self.failure: CloisterError | None = None
        self.failures: dict[str, CloisterError] = {}
        self.calls: list[str] = []
        self.queries: list[admin_pb2.QueryAuditRequest] = []
        self.answer = admin_pb2.GetStatusResponse(
            version="0.1.0", gateway_address="127.0.0.1:8443", operator="alice", audit_size=1234,
            audit_root=bytes(range(32)), isolation="none", profile="demo", site="ward", deployments=[deployment()],
            peers=[admin_pb2.Peer(name=name, connected=True) for name in ("importer", "engine-host")],
        )  # fmt: skip
        self.tenant_list = [
            admin_pb2.Tenant(
                name="ward-notes", models=["notes"], max_concurrent=64, weight=100, tokens_used=12345,
                tokens_reserved=678, requests_open=3,
            )
        ]  # fmt: skip
        self.key_list = [
            admin_pb2.Key(key_id="cbb503ba7ff8", tenant="ward-notes", application="summary", state="active")
        ]
        self.key_list[0].expires_at.FromDatetime(START + timedelta(days=90))
        self.version_list = [
            admin_pb2.ModelVersion(
                name="demo-notes-s", version="1.0.1", sequence=1, model_digest=DIGEST, kind="model",
                signers=["00945d3d", "85af23ee"], total_size=3_772_443, architecture="LlamaForCausalLM",
            )
        ]  # fmt: skip
        self.version_list[0].state = "active"
        self.import_list: list[admin_pb2.Import] = []
        self.alias_list = [admin_pb2.Alias(name="notes", deployment="notes")]
        self.log = [record(n) for n in range(1, 251)]
        self.verdict = admin_pb2.VerifyAuditResponse(intact=True, size=1234, root=bytes(range(32)))
        self.progress: list[admin_pb2.ImportBundleResponse] = []
        self.go = threading.Event()

    def status(self) -> admin_pb2.GetStatusResponse:
        self._called("status")
        copy = admin_pb2.GetStatusResponse()
        copy.CopyFrom(self.answer)
        return copy

    def tenants(self) -> tuple[admin_pb2.Tenant, ...]:
        self._called("tenants")
        return tuple(self.tenant_list)

    def keys(self) -> tuple[admin_pb2.Key, ...]:
        self._called("keys")
        return tuple(self.key_list)

    def versions(self) -> tuple[admin_pb2.ModelVersion, ...]:
        self._called("versions")
        return tuple(self.version_list)

    def aliases(self) -> tuple[admin_pb2.Alias, ...]:
        self._called("aliases")
        return tuple(self.alias_list)

    def imports(self) -> tuple[admin_pb2.Import, ...]:
        self._called("imports")
        return tuple(self.import_list)

    def offer_volume(self, import_id: str, path: str) -> None:
        self._called(f"offer_volume {import_id} {path}")

    def query_audit(self, request: admin_pb2.QueryAuditRequest) -> admin_pb2.QueryAuditResponse:
        self._called("query_audit")
        self.queries.append(request)
        before = request.before_sequence or len(self.log) + 1
        found = [r for r in reversed(self.log) if r.sequence < before and r.kind.startswith(request.kind_prefix)]
        page = found[: request.limit]
        following = page[-1].sequence if len(found) > len(page) else 0
        return admin_pb2.QueryAuditResponse(records=page, next_before_sequence=following, log_size=len(self.log))

    def verify_audit(self) -> admin_pb2.VerifyAuditResponse:
        self._called("verify_audit")
        return self.verdict

    def import_bundle(self, path: str) -> Iterator[admin_pb2.ImportBundleResponse]:
        self._called(f"import_bundle {path}")
        yield from self.progress[:-1]
        assert self.go.wait(30)
        yield from self.progress[-1:]

    def close(self) -> None:
        self.calls.append("close")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        failure = self.failures.get(name, self.failure)
        if failure is not None:
            raise failure


def grow(port: FakePort, clock: Clock, second: int) -> None:
    """One second of a busy appliance: every counter moves."""
    clock.seconds += 1
    port.answer.audit_size += 17
    for number, found in enumerate(port.answer.deployments):
        found.engine.tokens_generated += 900 + 37 * number + second
        found.engine.tokens_prefilled += 500
        found.engine.tokens_cached += 130 + second
        found.engine.running = 3 + (second + number) % 7
        found.engine.waiting = (second * 3 + number) % 5
        found.engine.blocks_free = 120 - (second * 7) % 90
        found.engine.preemptions += second % 2
    for tenant in port.tenant_list:
        tenant.tokens_used += 911 + second
        tenant.requests_open = second % 8
        tenant.tokens_reserved = 600 + second * 13 % 400


def console(port: FakePort, clock: Clock | None = None, **options: object) -> ConsoleApp:
    """A console on the fake that asks when a test says so."""
    clock = clock or Clock()
    given = {"live": False, "utf8": True, "ansi": True, **options}
    return ConsoleApp(port, "~/.cloister", clock=clock, now=clock.now, **given)  # type: ignore[arg-type]  # a test's options


def screen(app: ConsoleApp) -> str:
    """What stands on the terminal, line by line, as the compositor has it."""
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips(app))


def strips(app: ConsoleApp) -> list[list[object]]:
    """The painted lines."""
    return [list(strip) for strip in app.screen._compositor.render_strips()]
