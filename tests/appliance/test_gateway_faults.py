"""What a client is told when something dies, stalls or fails, and that every lease is closed whatever happens."""

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest

from appliance.client import CloisterError
from appliance.control.admission import leases
from appliance.gateway import server
from appliance.gateway.limits import Limits
from appliance.gateway.quarantine import Passage, Quarantine
from appliance.gateway.sessions import Sessions
from appliance.protos import control_pb2, inference_pb2, inference_pb2_grpc
from engine.protos import engine_pb2
from tests.appliance.gateway_house import (
    API_KEY,
    House,
    Send,
    end,
    one_word_then_silence,
    open_house,
    say,
    silence,
)

KEY_METADATA = (("authorization", f"Bearer {API_KEY}"),)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


async def failure(house: House, **arguments: Any) -> CloisterError:
    """The error of one request that is not sent again."""
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", "x", retry=False, **arguments).result()
    return error.value


async def test_a_worker_that_dies_before_accepted_is_unavailable(house: House) -> None:
    house.worker.script = silence
    async with house.client() as client:
        running = asyncio.create_task(client.generate("notes", "x").result())
        await until(lambda: bool(house.worker.submits))
        await house.kill("worker-notes")
        with pytest.raises(CloisterError) as error:
            await running
    assert (error.value.status, error.value.code) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")
    assert error.value.retry_after is not None
    settled = await house.settled()
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_ENGINE_FAILED, "ENGINE_UNAVAILABLE")
    assert (settled.prompt_tokens, settled.completion_tokens) == (0, 0)
    assert len(house.control.asked("Admit")) == 1, "an admitted request's id is spent: it is not sent again"


async def test_a_worker_that_dies_after_accepted_aborts_and_what_it_said_is_delivered(house: House) -> None:
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        stream = client.generate("notes", "x")
        assert await anext(stream) == "Hel"
        await house.kill("worker-notes")
        with pytest.raises(CloisterError) as error:
            await anext(stream)
    assert (error.value.status, error.value.code) == (grpc.StatusCode.ABORTED, "ENGINE_RESTARTED")
    settled = await house.settled()
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_ENGINE_FAILED, "ENGINE_RESTARTED")
    assert (settled.prompt_tokens, settled.completion_tokens) == (1, 1)


async def test_a_worker_that_is_back_is_used_again_without_hands(house: House) -> None:
    async with house.client() as client:
        await client.generate("notes", "x").result()
        await house.kill("worker-notes")
        answer = asyncio.create_task(client.generate("notes", "x").result())
        await asyncio.sleep(0.3)
        await house.start_worker()
        assert (await answer).text == "Hello"
    assert house.worker.sessions == 2


async def test_no_worker_is_unavailable_before_anything_is_charged(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.gateway.sessions.CONNECT_S", 0.3)  # it waits for one that may be coming back
    await house.kill("worker-notes")
    error = await failure(house)
    assert (error.status, error.code) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")
    assert house.control.asked("Admit") == []


async def test_no_engine_text_is_unavailable(house: House) -> None:
    await house.kill("text-notes")
    error = await failure(house)
    assert (error.status, error.code) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")


async def test_a_request_is_sent_again_under_the_same_id_until_the_engine_is_there(house: House) -> None:
    await house.kill("text-notes")
    async with house.client() as client:
        answer = asyncio.create_task(client.generate("notes", "x").result())
        await until(lambda: len(house.control.asked("Authorize")) >= 2)
        await house.start_text()
        assert (await answer).text == "Hello"
    assert len({request.request_id for request in house.control.asked("Authorize")}) == 1


async def test_control_that_is_gone_is_unavailable(house: House) -> None:
    await house.kill("control")
    error = await failure(house)
    assert (error.status, error.code) == (grpc.StatusCode.UNAVAILABLE, "CONTROL_UNAVAILABLE")
    assert error.retry_after is not None


async def test_control_that_dies_mid_stream_means_no_ok_and_a_later_settlement(house: House) -> None:
    proceed = asyncio.Event()

    async def script(submit: Any, send: Send) -> None:
        send("Hel", [1])
        await proceed.wait()
        await say("lo")(submit, send)

    house.worker.script = script
    async with house.client() as client:
        stream = client.generate("notes", "x")
        assert await anext(stream) == "Hel"
        await house.kill("control")
        proceed.set()
        with pytest.raises(CloisterError) as error:
            await stream.result()
    assert (error.value.status, error.value.code) == (grpc.StatusCode.UNAVAILABLE, "CONTROL_UNAVAILABLE")
    assert stream.text == "Hello"
    await house.start_control()
    settled = await house.settled()
    assert (settled.lease, settled.outcome) == ("lease-ticket", control_pb2.OUTCOME_COMPLETED)


async def test_a_stream_whose_lease_control_has_closed_ends_at_once_and_so_does_its_work(house: House) -> None:
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        stream = client.generate("notes", "x")
        assert await anext(stream) == "Hel"
        house.control.closed_leases = ["lease-ticket", "lease-of-nobody"]
        with pytest.raises(CloisterError) as error:
            await anext(stream)
        assert (error.value.status, error.value.code) == (grpc.StatusCode.ABORTED, "LEASE_CLOSED")
        assert error.value.retry_after is None
        await house.worker.aborted.wait()
        settled = await house.settled()
        assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_CANCELLED, "LEASE_CLOSED")
        assert house.worker.aborts == [house.worker.submits[0].handle]
        house.control.closed_leases = []
    named = [list(beat.leases) for beat in house.control.asked("Heartbeat")]
    assert ["lease-ticket"] in named
    await until(lambda: not house.control.asked("Heartbeat")[-1].leases)


async def test_an_answer_that_only_waits_for_its_reader_ends_with_its_lease(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.gateway.rows.MAX_PENDING_BYTES", 64 << 20)

    async def flood(submit: Any, send: Send) -> None:
        await say(*["y" * (3 << 20)] * 3)(submit, send)

    house.worker.script = flood
    async with house.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model="notes", text="xx"), metadata=KEY_METADATA)
        await call.wait_for_connection()
        await until(lambda: bool(house.worker.submits))
        house.control.closed_leases = ["lease-ticket"]
        assert (await house.settled()).reason == "LEASE_CLOSED"
        with pytest.raises(grpc.aio.AioRpcError, match="LEASE_CLOSED"):
            _ = [event async for event in call]


async def test_a_control_that_is_silent_too_long_ends_the_streams(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SILENCE_S", 1.5)
    monkeypatch.setattr(server, "HEARTBEAT_S", 0.1)
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        stream = client.generate("notes", "x")
        assert await anext(stream) == "Hel"
        house.control.hold["Heartbeat"] = asyncio.Event()
        with pytest.raises(CloisterError) as error:
            await anext(stream)
    assert (error.value.status, error.value.code) == (grpc.StatusCode.ABORTED, "LEASE_CLOSED")
    await house.worker.aborted.wait()


def test_the_gateway_gives_up_no_later_than_control_does() -> None:
    assert server.SILENCE_S <= leases.SILENCE_S


async def test_what_control_refuses_to_admit_may_be_sent_again_under_its_id(house: House) -> None:
    house.control.refuse["Admit"] = CloisterError(
        "TENANT_CONCURRENCY", "x", grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=timedelta(seconds=0.5)
    )
    assert await pushback(house) == "500"
    house.control.refuse["Admit"] = CloisterError("AUDIT_BLOCKED", "x", grpc.StatusCode.UNAVAILABLE)
    assert await pushback(house) is None


async def test_an_admission_without_an_answer_is_not_sent_again(house: House) -> None:
    house.control.hold["Admit"] = asyncio.Event()
    asked = asyncio.create_task(pushback(house))
    await house.control.arrived["Admit"].wait()
    await house.kill("control")
    assert await asked == "-1"


async def test_a_ticket_control_does_not_know_any_more_is_asked_for_once_again(house: House) -> None:
    invalid = CloisterError("TICKET_INVALID", "x", grpc.StatusCode.FAILED_PRECONDITION)
    house.control.refuse_once["Admit"] = invalid
    async with house.client() as client:
        assert (await client.generate("notes", "x").result()).text == "Hello"
    assert [len(house.control.asked(name)) for name in ("Authorize", "Admit", "Settle")] == [2, 2, 1]
    house.control.refuse["Admit"] = invalid
    assert (await failure(house)).code == "TICKET_INVALID"
    assert len(house.control.asked("Admit")) == 4


async def pushback(house: House) -> str | None:
    """When a refused request may be sent again, in the words of gRPC."""
    async with house.channel(options=(("grpc.enable_retries", 0),)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model="notes", text="x"), metadata=KEY_METADATA)
        with pytest.raises(grpc.aio.AioRpcError):
            _ = [event async for event in call]
        value = dict(await call.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
        return None if value is None else str(value)


async def test_the_engines_error_before_a_token_is_the_requests_alone(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        send(end=end(engine_pb2.END_REASON_ERROR, error_reason="NUMERIC_FAULT", error_message="NaN logits"))

    house.worker.script = script
    error = await failure(house)
    assert (error.status, error.code, error.message) == (
        grpc.StatusCode.INTERNAL, "NUMERIC_FAULT", "NaN logits",
    )  # fmt: skip
    assert (await house.settled()).outcome == control_pb2.OUTCOME_ENGINE_FAILED
    house.worker.script = say("Hello")
    async with house.client() as client:
        assert (await client.generate("notes", "x").result()).text == "Hello"
    assert house.worker.sessions == 1


@pytest.mark.parametrize(
    ("code", "status", "field"),
    [
        ("WORKER_DRAINING", grpc.StatusCode.UNAVAILABLE, None),
        ("TOKEN_OUT_OF_RANGE", grpc.StatusCode.INVALID_ARGUMENT, None),
        ("INVALID_SAMPLING", grpc.StatusCode.INVALID_ARGUMENT, "sampling.logit_bias"),
    ],
)
async def test_what_the_engine_refuses_is_a_refusal_never_accepted(
    house: House, code: str, status: grpc.StatusCode, field: str | None
) -> None:
    async def script(submit: Any, send: Send) -> None:
        send(end=end(engine_pb2.END_REASON_ERROR, error_reason=code, error_message="why"))

    house.worker.script = script
    async with house.client() as client:
        stream = client.generate("notes", "x")
        with pytest.raises(CloisterError) as error:
            await stream.result()
        with pytest.raises(RuntimeError, match="accepted"):
            _ = stream.accepted
    assert (error.value.status, error.value.code, error.value.field) == (status, code, field)
    assert (await house.settled()).outcome == control_pb2.OUTCOME_REFUSED


async def test_a_prompt_that_may_have_wedged_engine_text_is_not_sent_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.gateway.texts.SUSPECT_S", 0.0)
    house.text.refuse = (grpc.StatusCode.UNAVAILABLE, "Socket closed")
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", "x").result()
    assert (error.value.status, error.value.code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PREPARE_TIMEOUT")
    assert len(house.text.requests) == 1


async def test_a_session_forgets_a_request_when_it_has_ended_or_was_given_up(house: House) -> None:
    sessions = Sessions()
    session = await sessions.open(str(house.home / "run" / "worker-notes.sock"))
    rows = session.submit(engine_pb2.Submit(token_ids=[1]), a_passage())
    assert session.num_running == 1
    while not (await rows.next()).HasField("end"):
        pass
    assert session.num_running == 0
    house.worker.script = silence
    stuck = session.submit(engine_pb2.Submit(token_ids=[1]), a_passage())
    session.release(stuck)
    assert session.num_running == 0
    await sessions.close()


async def test_the_engines_error_mid_stream_comes_after_what_it_said(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        send("Hel", [1])
        send("lo", [2], end(engine_pb2.END_REASON_ERROR, error_reason="STEP_FAILED", error_message="x"))

    house.worker.script = script
    async with house.client() as client:
        stream = client.generate("notes", "x")
        with pytest.raises(CloisterError) as error:
            await stream.result()
    assert (stream.text, error.value.code) == ("Hello", "STEP_FAILED")


async def test_an_end_nobody_asked_for_is_a_restart(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        send("Hel", [1])
        send(end=end(engine_pb2.END_REASON_ABORTED))

    house.worker.script = script
    assert (await failure(house)).code == "ENGINE_RESTARTED"


async def test_a_client_that_does_not_read_is_cut_off_and_the_others_are_not(house: House) -> None:
    async def flood(submit: Any, send: Send) -> None:
        if len(submit.token_ids) == 1:
            return await say("Hello")(submit, send)
        while True:
            send("y" * 16384, [1])
            await asyncio.sleep(0)

    house.worker.script = flood
    async with house.channel() as channel, house.client() as other:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model="notes", text="xx"), metadata=KEY_METADATA)
        await call.wait_for_connection()
        await house.worker.aborted.wait()
        settled = await house.settled()
        assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_CANCELLED, "SLOW_CLIENT")
        assert (await other.generate("notes", "x").result()).text == "Hello"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            _ = [event async for event in call]
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "SLOW_CLIENT" in (error.value.details() or "")


async def test_a_client_that_makes_no_room_for_one_message_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flood(submit: Any, send: Send) -> None:
        send("y" * (8 << 20), [1])
        send("z", [2])

    monkeypatch.setattr("appliance.gateway.rows.MAX_PENDING_BYTES", 64 << 20)
    async with open_house(Limits(stall_seconds=0.05)) as house, house.channel() as channel:
        house.worker.script = flood
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model="notes", text="xx"), metadata=KEY_METADATA)
        await call.wait_for_connection()
        assert (await house.settled()).reason == "SLOW_CLIENT"
        call.cancel()


async def test_what_waits_for_the_record_of_the_request_is_not_held_against_the_client(house: House) -> None:
    house.control.hold["AwaitIntent"] = asyncio.Event()

    async def script(submit: Any, send: Send) -> None:
        for _ in range(80):
            send("y" * 8192, [1])
        send(end=end(completion_tokens=80))

    house.worker.script = script
    async with house.client() as client:
        answer = asyncio.create_task(client.generate("notes", "x").result())
        await house.control.arrived["AwaitIntent"].wait()
        (session,) = house.gateway._sessions._live.values()
        while session.num_running:
            await asyncio.sleep(0.01)
        house.control.hold["AwaitIntent"].set()
        assert (await answer).text == "y" * (80 * 8192)


async def test_more_requests_than_the_gateway_answers_are_refused_at_once() -> None:
    async with open_house(Limits(max_streams=1)) as house, house.client() as client:
        house.worker.script = one_word_then_silence
        async with client.generate("notes", "x") as running:
            assert await anext(running) == "Hel"
            error = await failure(house)
        assert (error.status, error.code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "GATEWAY_BUSY")
        assert error.retry_after is not None


async def test_draining_finishes_what_runs_and_refuses_what_comes(house: House) -> None:
    proceed = asyncio.Event()

    async def script(submit: Any, send: Send) -> None:
        send("Hel", [1])
        await proceed.wait()
        await say("lo")(submit, send)

    house.worker.script = script
    async with house.client() as client:
        running = client.generate("notes", "x")
        assert await anext(running) == "Hel"
        house.process.stop()
        await asyncio.sleep(0.1)
        error = await failure(house)
        assert (error.status, error.code) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        proceed.set()
        assert (await running.result()).text == "Hello"


async def test_what_outlasts_the_grace_is_cut_off_and_settled(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.Gateway.drain, "__defaults__", (0.1,))
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        running = client.generate("notes", "x")
        assert await anext(running) == "Hel"
        house.process.stop()
        with pytest.raises(CloisterError) as error:
            await anext(running)
    assert (error.value.status, error.value.code) == (grpc.StatusCode.UNAVAILABLE, "GATEWAY_STOPPING")
    settled = await house.settled()
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_CANCELLED, "GATEWAY_STOPPING")


async def test_after_a_storm_of_cancellations_every_lease_is_settled(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def slowly(submit: Any, send: Send) -> None:
        for _ in range(20):
            send("x", [1])
            await asyncio.sleep(0.01)
        await say("end")(submit, send)

    house.worker.script = slowly

    async def one(client: Any, index: int) -> None:
        stream = client.generate("notes", "x", timeout=0.05 if index % 5 == 0 else 30)
        try:
            async for _ in stream:
                if index % 2:
                    stream.cancel()
        except CloisterError:
            return

    async with house.client() as client:
        await asyncio.gather(*(one(client, index) for index in range(100)))
    await until(lambda: len(house.control.asked("Settle")) == len(house.control.asked("Admit")))
    outcomes = {request.outcome for request in house.control.asked("Settle")}
    assert {control_pb2.OUTCOME_COMPLETED, control_pb2.OUTCOME_CANCELLED} <= outcomes
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def a_passage() -> Passage:
    """The way in of a request that nothing is held against."""
    return Passage(Quarantine(), b"")


async def until(condition: Any) -> None:
    """Wait until `condition` holds."""
    while not condition():
        await asyncio.sleep(0.02)
