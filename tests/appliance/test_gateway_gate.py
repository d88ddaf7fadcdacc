"""What one certificate can do to the others, even without a key: nothing that lasts, and nothing unrecorded."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from appliance.client import CloisterError
from appliance.errors import from_rpc_error
from appliance.gateway import gate, refusals
from appliance.gateway.control import ControlClient
from appliance.gateway.limits import Limits
from appliance.gateway.refusals import Refusals
from appliance.policy import TABLE, Audience, AuditClass, Rule
from appliance.protos import control_pb2, inference_pb2
from tests.appliance.gateway_house import API_KEY, AUTHORITY, House, one_word_then_silence, open_house
from tests.appliance.pki import IDENTITY

GENERATE = "/cloister.inference.v1.InferenceService/Generate"
KEY_METADATA = (("authorization", f"Bearer {API_KEY}"),)
OTHER = AUTHORITY.client(IDENTITY.replace("ward", "other"))
CANARY = "zebra-canary-4711"


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


async def ended(call: Any) -> CloisterError:
    """The error a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        _ = [event async for event in call]
    return from_rpc_error(error.value)


def sender(channel: grpc.aio.Channel, method: str = GENERATE) -> Any:
    """Calls with raw bytes as their one message."""
    return channel.unary_stream(method)


def opener(channel: grpc.aio.Channel) -> Any:
    """Calls whose message is left to the test."""
    return channel.stream_stream(GENERATE)


def reasons(house: House) -> list[tuple[str, int]]:
    """Reason and count of the refusals on record."""
    return [(r.reason, r.count) for r in house.control.asked("RecordRefusal")]


async def until(condition: Any) -> None:
    """Wait until `condition` holds."""
    while not condition():
        await asyncio.sleep(0.02)


async def test_calls_that_never_send_their_request_fill_their_own_certificates_share_alone() -> None:
    limits = Limits(request_seconds=2.0)
    async with open_house(limits) as house, house.channel(OTHER) as channel, house.client() as victim:
        send = opener(channel)
        silent = [asyncio.create_task(ended(send())) for _ in range(limits.max_calls_per_certificate)]
        await asyncio.sleep(0.3)
        one_more = await ended(send())
        assert (one_more.status, one_more.code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        assert one_more.retry_after is not None
        assert (await victim.generate("notes", "x").result()).text == "Hello"
        late = {(error.status, error.code) for error in await asyncio.gather(*silent)}
        assert late == {(grpc.StatusCode.DEADLINE_EXCEEDED, "REQUEST_LATE")}
        assert (await ended(sender(channel)(b""))).code == "API_KEY_MISSING", "the share is free again"
    assert house.control.asked("Authorize")[0].caller.identity == IDENTITY


async def test_more_health_watches_than_a_certificate_may_have_are_refused(house: House) -> None:
    async with house.channel(OTHER) as channel, house.client() as victim:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(gate.MAX_WATCHES)]
        for watch in watches:
            await watch.read()
        assert (await ended(stub.Watch(health_pb2.HealthCheckRequest()))).code == "TOO_MANY_CALLS"
        await stub.Check(health_pb2.HealthCheckRequest())
        assert (await victim.generate("notes", "x").result()).text == "Hello"
        for watch in watches:
            watch.cancel()
        await asyncio.sleep(0.2)
        again = stub.Watch(health_pb2.HealthCheckRequest())
        await again.read()
        again.cancel()


async def test_a_call_that_goes_away_before_its_message_leaves_nothing(house: House) -> None:
    the_gate = house.gateway._gate
    async with house.channel() as channel:
        call = opener(channel)()
        await until(lambda: the_gate.num_open == 1)
        call.cancel()
        await until(lambda: the_gate.num_open == 0)
        await until(lambda: the_gate.num_reading == 0)


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\xff" + CANARY.encode(), b"\x12\x02\xff\xfe"])
async def test_bytes_that_are_no_request_are_refused_in_our_form(house: House, raw: bytes) -> None:
    async with house.channel() as channel:
        error = await ended(sender(channel)(raw, metadata=KEY_METADATA))
    assert (error.status, error.code) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert CANARY not in error.message
    assert reasons(house) == [("MALFORMED_REQUEST", 1)]


async def test_a_call_that_ends_without_a_message_is_malformed(house: House) -> None:
    async with house.channel() as channel:
        call = opener(channel)(metadata=KEY_METADATA)
        await call.done_writing()
        assert (await ended(call)).code == "MALFORMED_REQUEST"


@pytest.mark.parametrize("method", ["/cloister.inference.v1.InferenceService/Steal", "/a/b", "/" + "x" * 5000])
async def test_a_method_that_does_not_exist_is_refused_in_our_form_and_recorded(house: House, method: str) -> None:
    async with house.channel() as channel:
        error = await ended(sender(channel, method)(b""))
    assert (error.status, error.code) == (grpc.StatusCode.UNIMPLEMENTED, "METHOD_UNKNOWN")
    (record,) = house.control.asked("RecordRefusal")
    assert (record.caller.identity, record.reason) == (IDENTITY, "METHOD_UNKNOWN")
    assert len(record.method) <= 256


@pytest.mark.parametrize("row", [None, Rule(Audience.OPERATOR, AuditClass.NONE)])
async def test_a_served_method_without_a_tenants_row_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch, row: Rule | None
) -> None:
    table = {**TABLE, GENERATE: row} if row else {name: rule for name, rule in TABLE.items() if name != GENERATE}
    monkeypatch.setattr("appliance.policy.TABLE", table)
    async with house.channel() as channel:
        request = inference_pb2.GenerateRequest(model="notes", text="x").SerializeToString()
        error = await ended(sender(channel)(request, metadata=KEY_METADATA))
    assert (error.status, error.code) == (grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
    assert house.control.asked("Authorize") == []


async def test_a_flood_of_refusals_is_recorded_as_the_first_and_a_count(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "INTERVAL_S", 0.3)
    async with house.channel() as channel:
        send = sender(channel)
        await ended(send(b""))
        assert reasons(house) == [("API_KEY_MISSING", 1)]
        await asyncio.gather(*(ended(send(b"")) for _ in range(50)))
        await until(lambda: sum(count for _, count in reasons(house)) == 51)
    assert len(reasons(house)) <= 6
    assert {r.caller.api_key for r in house.control.asked("RecordRefusal")} == {""}


async def test_refusals_that_control_does_not_take_are_offered_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "INTERVAL_S", 0.1)
    house.control.refuse["RecordRefusal"] = CloisterError("BROKEN", "x", grpc.StatusCode.INTERNAL)
    async with house.channel() as channel:
        for _ in range(3):
            await ended(sender(channel)(b""))
    house.control.calls.clear()
    del house.control.refuse["RecordRefusal"]
    await until(lambda: reasons(house) == [("API_KEY_MISSING", 3)])


class ClosedControl(ControlClient):
    """A control that takes no record."""

    def __init__(self) -> None:
        self.offered: list[control_pb2.RecordRefusalRequest] = []

    async def record_refusal(self, request: control_pb2.RecordRefusalRequest) -> bool:
        """Never."""
        self.offered.append(request)
        return False


async def test_refusals_nobody_took_are_counted_in_the_log_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    book = Refusals(ClosedControl())
    caller = control_pb2.Caller(identity=IDENTITY, certificate_sha256=b"c" * 32, api_key=API_KEY)
    for _ in range(5):
        await book.record(caller, GENERATE, "", "API_KEY_MISSING")
    await book.close()
    (record,) = [r for r in caplog.records if r.message == "refusals not recorded"]
    assert (record.__dict__["count"], record.__dict__["certificate"]) == (5, (b"c" * 32).hex())


async def test_refusals_of_ever_new_certificates_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "MAX_KINDS", 4)
    control = ClosedControl()
    book = Refusals(control)
    for index in range(20):
        caller = control_pb2.Caller(identity=IDENTITY, certificate_sha256=bytes([index]) * 32)
        await book.record(caller, GENERATE, "", "API_KEY_MISSING")
    assert book.num_kinds == 5
    control.offered.clear()
    await book.close()
    assert sum(request.count for request in control.offered) == 20
    (shared,) = [request for request in control.offered if not request.caller.certificate_sha256]
    assert (shared.count, shared.caller.identity) == (16, "")


async def test_a_tenant_has_its_requests_at_once_and_no_more_from_the_first_step_on(house: House) -> None:
    house.control.max_concurrent = 1
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        async with client.generate("notes", "x") as running:
            assert await anext(running) == "Hel"
            with pytest.raises(CloisterError) as error:
                await client.generate("notes", "y", retry=False).result()
            assert (error.value.status, error.value.code) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_CONCURRENCY",
            )  # fmt: skip
            assert error.value.retry_after is not None
            assert len(house.text.requests) == 1, "engine-text did not see the second prompt"
        await house.settled()
        async with client.generate("notes", "x") as again:
            assert await anext(again) == "Hel", "the slot is free again"


@pytest.mark.parametrize(
    ("arguments", "unit"),
    [({"text": "x" * (64 * 128 + 1)}, "prompt_bytes"), ({"token_ids": [1] * 65}, "prompt_token_ids")],
)
async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(
    house: House, arguments: dict[str, Any], unit: str
) -> None:
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", **arguments).result()
        assert (error.value.code, unit in error.value.metadata) == ("CONTEXT_OVERFLOW", True)
        half = {"role": "user", "content": "ä" * 2100}
        with pytest.raises(CloisterError, match="CONTEXT_OVERFLOW"):
            await client.chat("notes", [half, half]).result()
    assert house.text.requests == []
