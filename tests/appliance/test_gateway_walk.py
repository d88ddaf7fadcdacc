"""One request through a real gateway over mutual TLS: the order of the walk, and what the client gets."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from appliance.client import CloisterError, Message
from appliance.protos import control_pb2, inference_pb2, inference_pb2_grpc
from engine.protos import engine_pb2
from tests.appliance.gateway_house import (
    API_KEY,
    CONTEXT,
    House,
    end,
    one_word_then_silence,
    open_house,
    say,
    silence,
)
from tests.appliance.pki import IDENTITY


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


async def test_an_answer_streams_and_ends_with_usage_and_a_receipt(house: House) -> None:
    request_id = str(uuid.uuid4()).upper()
    async with house.client() as client:
        stream = client.generate("notes", "12345", temperature=0, seed=9, request_id=request_id)
        deltas = [text async for text in stream]
    assert deltas == ["Hel", "lo"]
    assert (stream.accepted.request_id, stream.accepted.seed) == (request_id.lower(), 9)
    assert (stream.accepted.prompt_tokens, stream.accepted.model_digest) == (5, "d" * 64)
    assert (stream.finished.reason, stream.finished.stop_token_id) == ("stop", 2)
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (5, 3)
    assert stream.completed.timings.time_to_first_token.total_seconds() == 0.003
    assert stream.receipt.audit_sequence == 8
    assert stream.receipt.leaf_hash == b"L" * 32


async def test_control_learns_who_asked_and_what_it_may_cost_but_no_text(house: House) -> None:
    async with house.client() as client:
        await client.generate("notes", "secret words", max_tokens=5, stop=["zebra"], temperature=0.5).result()
    (authorize,) = house.control.asked("Authorize")
    assert authorize.caller.identity == IDENTITY
    assert authorize.caller.api_key == API_KEY
    assert len(authorize.caller.certificate_sha256) == 32
    assert (authorize.method, authorize.model) == ("/cloister.inference.v1.InferenceService/Generate", "notes")
    (admit,) = house.control.asked("Admit")
    assert (admit.ticket, admit.prompt_tokens, admit.max_tokens) == ("ticket", 12, 5)
    assert admit.prompt_sha256 == hashlib.sha256(b"secret words").digest()
    assert admit.parameters["temperature"] == "0.5"
    assert admit.parameters["stop"] == "1"
    assert b"zebra" not in admit.SerializeToString()
    settled = await house.settled()
    assert (settled.lease, settled.outcome) == ("lease-ticket", control_pb2.OUTCOME_COMPLETED)
    assert (settled.prompt_tokens, settled.completion_tokens, settled.finish_reason) == (12, 3, "stop")
    assert settled.HasField("duration")


async def test_the_worker_gets_the_request_without_any_name(house: House) -> None:
    async with house.client() as client:
        messages = [Message("system", "Be short."), Message("user", "Hello")]
        stream = client.chat(
            "notes", messages, top_p=0.5, top_k=4, stop=["END"], stop_token_ids=[3], ignore_eos=True
        )
        await stream.result()
    (submit,) = house.worker.submits
    assert (submit.scope, submit.salt, submit.weight) == ("s1", b"salt", 3)
    assert (list(submit.token_ids), submit.max_tokens) == ([0, 1], CONTEXT - 2)
    assert (submit.temperature, submit.top_p, submit.top_k) == (1.0, 0.5, 4)
    assert (list(submit.stop), list(submit.stop_token_ids), submit.ignore_eos) == (["END"], [3], True)
    assert submit.seed == stream.accepted.seed
    assert [m.role for m in house.text.requests[0].conversation.messages] == ["system", "user"]


async def test_a_seed_is_drawn_for_each_request_that_has_none(house: House) -> None:
    async with house.client() as client:
        seeds = [(await client.generate("notes", "x").result()).accepted.seed for _ in range(3)]
    assert len(set(seeds)) == 3
    assert max(seeds) > 2**32


async def test_a_seed_and_a_temperature_of_zero_are_values_not_defaults(house: House) -> None:
    async with house.client() as client:
        await client.generate("notes", "x", seed=0, temperature=0).result()
    assert (house.worker.submits[0].seed, house.worker.submits[0].temperature) == (0, 0.0)


async def test_no_message_leaves_before_the_intent_is_durable(house: House) -> None:
    house.control.hold["AwaitIntent"] = asyncio.Event()
    async with house.client() as client:
        stream = client.generate("notes", "x")
        first = asyncio.create_task(anext(stream))
        await house.control.arrived["AwaitIntent"].wait()
        # The engine has answered, and the gateway has read it: another request of the same session came through.
        await _until(lambda: len(house.worker.submits) == 1)
        done, _ = await asyncio.wait({first}, timeout=0.5)
        assert not done
        with pytest.raises(RuntimeError, match="accepted"):
            _ = stream.accepted
        house.control.hold["AwaitIntent"].set()
        assert await first == "Hel"


async def test_ok_waits_until_the_outcome_is_durable(house: House) -> None:
    house.control.hold["Settle"] = asyncio.Event()
    async with house.client() as client:
        stream = client.generate("notes", "x")
        ended = asyncio.create_task(stream.result())
        await house.control.arrived["Settle"].wait()
        done, _ = await asyncio.wait({ended}, timeout=0.5)
        assert not done
        house.control.hold["Settle"].set()
        assert (await ended).receipt.audit_sequence == 8


async def test_a_step_is_a_message_and_an_unfinished_character_makes_an_empty_one(house: House) -> None:
    house.worker.script = say("a", "", "b")
    async with house.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(model="notes", text="x")
        request.output.return_token_ids = True
        call = stub.Generate(request, metadata=(("authorization", f"Bearer {API_KEY}"),))
        events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["accepted", "delta", "delta", "delta", "finished", "completed"]
    assert [(e.delta.text, list(e.delta.token_ids)) for e in events[1:4]] == [("a", [0]), ("", [1]), ("b", [2])]


async def test_token_ids_are_left_out_unless_asked_for(house: House) -> None:
    async with house.client() as client:
        assert (await client.generate("notes", token_ids=[5, 6]).result()).token_ids == ()
        assert (await client.generate("notes", token_ids=[5, 6], return_token_ids=True).result()).token_ids == (
            0,
            1,
        )
    assert list(house.worker.submits[0].token_ids) == [5, 6]


@pytest.mark.parametrize(
    ("last_word", "reason", "matched"),
    [
        (end(stop_string="END"), "stop", ("END", None)),
        (end(stop_token_id=0), "stop", (None, 0)),
        (end(engine_pb2.END_REASON_LENGTH), "length", (None, None)),
    ],
)
async def test_why_it_ended_reaches_the_client(
    house: House, last_word: engine_pb2.End, reason: str, matched: tuple[str | None, int | None]
) -> None:
    async def script(submit: object, send: object) -> None:
        send("x", [1], last_word)  # type: ignore[operator]  # what the house passes

    house.worker.script = script
    async with house.client() as client:
        finished = (await client.generate("notes", "x").result()).finished
    assert (finished.reason, (finished.stop_string, finished.stop_token_id)) == (reason, matched)
    assert (await house.settled()).finish_reason == reason


async def test_all_requests_share_one_session(house: House) -> None:
    async with house.client() as client:
        texts = await asyncio.gather(*(client.generate("notes", "x").result() for _ in range(40)))
    assert {completion.text for completion in texts} == {"Hello"}
    assert house.worker.sessions == 1
    assert len({submit.handle for submit in house.worker.submits}) == 40


async def test_the_models_of_the_tenant_are_listed(house: House) -> None:
    async with house.client() as client:
        (model,) = await client.list_models()
    assert (model.name, model.max_context_tokens, model.capabilities, model.ready) == (
        "notes", CONTEXT, ("chat",), True,
    )  # fmt: skip


async def test_a_client_that_goes_away_aborts_its_request_and_is_settled_as_cancelled(house: House) -> None:
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        stream = client.generate("notes", "x")
        assert await anext(stream) == "Hel"
        stream.cancel()
        await house.worker.aborted.wait()
    settled = await house.settled()
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_CANCELLED, "CANCELLED")
    assert settled.completion_tokens == 2, "what the worker said in its last word"
    assert house.worker.aborts == [house.worker.submits[0].handle]


async def test_a_client_that_goes_away_while_it_is_admitted_leaves_no_lease(house: House) -> None:
    house.control.hold["Admit"] = asyncio.Event()
    async with house.client() as client:
        stream = client.generate("notes", "x")
        first = asyncio.create_task(anext(stream))
        await house.control.arrived["Admit"].wait()
        stream.cancel()
        with pytest.raises(CloisterError, match="CANCELLED"):
            await first
        await asyncio.sleep(0.2)
        house.control.hold["Admit"].set()
        settled = await house.settled()
    assert (settled.lease, settled.outcome) == ("lease-ticket", control_pb2.OUTCOME_CANCELLED)
    assert house.worker.submits == []


async def test_a_deadline_aborts_the_request_and_is_settled_as_such(house: House) -> None:
    house.worker.script = silence
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", "x", timeout=0.5).result()
    assert error.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await house.settled()).outcome == control_pb2.OUTCOME_DEADLINE
    assert house.worker.aborts == [house.worker.submits[0].handle]


async def test_health_serves_every_service_and_tells_all_watchers(house: House) -> None:
    async with house.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="cloister.inference.v1.InferenceService")
        await _until_serving(stub, request)
        watchers = [stub.Watch(request) for _ in range(3)]
        for watcher in watchers:
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVING
        watchers[0].cancel()
        await house.kill("control")
        for watcher in watchers[1:]:
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await house.start_control()
        for watcher in watchers[1:]:
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVING
            watcher.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def _until_serving(stub: object, request: object) -> None:
    async def serving() -> bool:
        response = await stub.Check(request)  # type: ignore[attr-defined]  # the health stub has no types
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    while not await serving():
        await asyncio.sleep(0.02)


async def _until(condition: object) -> None:
    while not condition():  # type: ignore[operator]  # a function
        await asyncio.sleep(0.02)
