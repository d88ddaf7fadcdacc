"""Embed and Rerank: what a client asks of a real gateway, and what it gets; whole, or not at all."""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from appliance.client import CloisterError, Embeddings
from appliance.client.sync import Client
from appliance.gateway import quarantine
from appliance.gateway.gathering import unit
from appliance.protos import control_pb2, inference_pb2, inference_pb2_grpc
from engine.protos import engine_pb2
from tests.appliance.gateway_house import (
    API_KEY,
    AUTHORITY,
    CLIENT,
    CONTEXT,
    House,
    Send,
    computed,
    end,
    open_house,
    silence,
)

KEY_METADATA = (("authorization", f"Bearer {API_KEY}"),)
Script = Callable[[Any, Send], Awaitable[None]]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        opened.worker.script = computed
        yield opened


def after(count: int, first: Script, then: Script) -> Script:
    """A script: as `first` for so many requests, as `then` for the others."""
    seen = iter(range(1_000_000))

    async def script(submit: Any, send: Send) -> None:
        await (first if next(seen) < count else then)(submit, send)

    return script


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def failure(asked: Awaitable[object]) -> CloisterError:
    with pytest.raises(CloisterError) as error:
        await asked
    return error.value


async def test_each_input_has_its_vector_and_all_are_one_request(house: House) -> None:
    async with house.client() as client:
        answer = await client.embed("notes", ["abc", [1, 2, 3, 4]], normalize=False)
    assert answer.vectors == ((3.0, 0.0, 4.0), (4.0, 0.0, 4.0))
    assert [(one.index, one.prompt_tokens, one.truncated) for one in answer.embeddings] == [
        (0, 3, False), (1, 4, False),
    ]  # fmt: skip
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 0)
    assert (usage.cached_prompt_tokens, usage.recomputed_tokens) == (2, 4)
    assert (answer.timings.queue.total_seconds(), answer.timings.compute.total_seconds()) == (2.0, 2.0)
    assert (answer.model_digest, answer.receipt.request_id) == ("d" * 64, answer.request_id)
    assert (answer.receipt.audit_sequence, answer.receipt.leaf_hash) == (8, b"L" * 32)
    (admitted,) = house.control.asked("Admit")
    assert (admitted.prompt_tokens, admitted.max_tokens, admitted.answers, admitted.inputs) == (7, 0, 0, 2)
    assert dict(admitted.parameters) == {"inputs": "2", "truncate": "false", "normalize": "false"}
    assert len(house.control.asked("AwaitIntent")) == 1
    settled = await house.settled()
    assert (settled.outcome, settled.finish_reason) == (control_pb2.OUTCOME_COMPLETED, "")
    assert (settled.prompt_tokens, settled.completion_tokens) == (7, 0)


async def test_the_worker_is_told_what_is_wanted_of_each_input(house: House) -> None:
    async with house.client() as client:
        await client.embed("notes", "abc")
        await client.rerank("notes", "ab", ["xyz"])
    vector, score = house.worker.submits
    assert (vector.task, list(vector.token_ids), list(vector.type_ids)) == (engine_pb2.TASK_EMBED, [0, 1, 2], [])
    assert (score.task, list(score.token_ids)) == (engine_pb2.TASK_SCORE, [0, 1, 2, 3, 4])
    assert list(score.type_ids) == [0, 0, 1, 1, 1]
    assert {(s.scope, s.salt, s.weight) for s in house.worker.submits} == {("s1", b"salt", 3)}
    asked = house.text.requests
    assert [request.task for request in asked] == [engine_pb2.TASK_EMBED, engine_pb2.TASK_SCORE]
    assert (asked[1].pair.query, asked[1].pair.document) == ("ab", "xyz")


async def test_a_vector_is_of_length_1_unless_the_client_wants_it_as_it_is(house: House) -> None:
    async with house.client() as client:
        (whole,) = (await client.embed("notes", "abc")).vectors
        (short,) = (await client.embed("notes", "abc", dimensions=2)).vectors
        (raw,) = (await client.embed("notes", "abc", dimensions=2, normalize=False)).vectors
    assert whole == pytest.approx((0.6, 0.0, 0.8))
    assert short == (1.0, 0.0), "cut first, then scaled"
    assert raw == (3.0, 0.0)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.6, 0.8], [1e-30, 1e-30], [3e38, 3e38]])
def test_scaling_to_length_1_neither_overflows_nor_touches_what_is_so_already(values: list[float]) -> None:
    scaled = unit(values)
    assert math.hypot(*scaled) == pytest.approx(1.0 if any(values) else 0.0)
    if values == [0.6, 0.8]:
        assert scaled is values


async def test_documents_come_best_first_and_at_equal_scores_in_their_order(house: House) -> None:
    async with house.client() as client:
        everything = await client.rerank("notes", "q", ["abc", "a", "abcde", "xyz"])
        best = await client.rerank("notes", "q", ["abc", "a", "abcde", "xyz"], top_n=2)
    assert [(one.index, one.score) for one in everything.results] == [(2, 6.0), (0, 4.0), (3, 4.0), (1, 2.0)]
    assert best.results == everything.results[:2]
    assert best.usage.prompt_tokens == everything.usage.prompt_tokens == 4 + 2 + 6 + 4, "all are computed and paid"
    assert dict(house.control.asked("Admit")[1].parameters) == {
        "documents": "4", "truncate": "false", "top_n": "2",
    }  # fmt: skip


async def test_what_is_too_long_is_refused_by_its_index_or_cut_and_said_to_be(house: House) -> None:
    long = "x" * (CONTEXT * 128 + 1)
    async with house.client() as client:
        error = await failure(client.embed("notes", ["a", long]))
        ids = await failure(client.embed("notes", ["a", "b", [1] * (CONTEXT + 1)]))
        pair = await failure(client.rerank("notes", "q", ["a", "b", long]))
        assert house.text.requests == [], "no tokens are made of what cannot fit"
        cut = await client.embed("notes", ["a", long], truncate=True)
        ranked = await client.rerank("notes", "q", ["a", long], truncate=True)
    for found, field in ((error, "inputs[1]"), (ids, "inputs[2]"), (pair, "documents[2]")):
        assert (found.status, found.code) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_OVERFLOW")
        assert found.field == field
        assert field in found.message
        assert "xxx" not in found.message
    assert [(one.truncated, one.prompt_tokens) for one in cut.embeddings] == [(False, 1), (True, CONTEXT)]
    assert [one.truncated for one in sorted(ranked.results, key=lambda one: one.index)] == [False, True]


async def test_256_inputs_are_one_request_and_257_are_refused(house: House) -> None:
    async with house.client() as client:
        answer = await client.embed("notes", ["x" * (1 + index % 9) for index in range(256)], normalize=False)
        error = await failure(client.embed("notes", ["x"] * 257))
        documents = await failure(client.rerank("notes", "q", ["x"] * 257))
    assert [one.index for one in answer.embeddings] == list(range(256))
    assert [vector[0] for vector in answer.vectors] == [1 + index % 9 for index in range(256)]
    assert answer.usage.prompt_tokens == sum(1 + index % 9 for index in range(256))
    assert len(house.control.asked("Admit")) == 1
    assert [(e.code, e.field) for e in (error, documents)] == [
        ("TOO_MANY_INPUTS", "inputs"), ("TOO_MANY_INPUTS", "documents"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (inference_pb2.EmbedRequest(model="notes"), "EMPTY_PROMPT", "inputs"),
        (inference_pb2.EmbedRequest(model="notes", inputs=[{"text": "a"}, {}]), "EMPTY_PROMPT", "inputs[1]"),
        (inference_pb2.EmbedRequest(model="notes", inputs=[{"text": ""}]), "EMPTY_PROMPT", "inputs[0]"),
        (
            inference_pb2.EmbedRequest(model="notes", inputs=[{"token_ids": {"ids": []}}]),
            "EMPTY_PROMPT",
            "inputs[0]",
        ),
        (
            inference_pb2.EmbedRequest(model="notes", inputs=[{"text": "a"}], dimensions=0),
            "INVALID_DIMENSIONS",
            "dimensions",
        ),
        (inference_pb2.EmbedRequest(inputs=[{"text": "a"}]), "MODEL_MISSING", "model"),
        (
            inference_pb2.EmbedRequest(model="notes", inputs=[{"text": "a"}], request_id="x"),
            "INVALID_REQUEST_ID",
            "request_id",
        ),
        (inference_pb2.RerankRequest(model="notes", documents=["a"]), "EMPTY_PROMPT", "query"),
        (inference_pb2.RerankRequest(model="notes", query="q"), "EMPTY_PROMPT", "documents"),
        (
            inference_pb2.RerankRequest(model="notes", query="q", documents=["a", ""]),
            "EMPTY_PROMPT",
            "documents[1]",
        ),
        (
            inference_pb2.RerankRequest(model="notes", query="q", documents=["a"], top_n=0),
            "INVALID_OUTPUT",
            "top_n",
        ),
    ],
)
async def test_a_field_that_is_not_sound_is_refused_by_name(
    house: House, request_: Any, code: str, field: str
) -> None:
    async with house.channel(options=(("grpc.enable_retries", 0),)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        method = stub.Embed if isinstance(request_, inference_pb2.EmbedRequest) else stub.Rerank
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await method(request_, metadata=KEY_METADATA)
    details = dict(error.value.trailing_metadata())["grpc-status-details-bin"]
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert code.encode() in details
    assert field.encode() in details
    assert house.control.asked("Authorize") == []
    (refused,) = house.control.asked("RecordRefusal")
    assert refused.reason == code


async def test_more_dimensions_than_the_model_has_are_refused_with_the_number_it_has(house: House) -> None:
    async with house.client() as client:
        error = await failure(client.embed("notes", ["a", "b"], dimensions=4))
    assert (error.status, error.code) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_DIMENSIONS")
    assert (error.field, error.metadata["max_dimensions"]) == ("dimensions", "3")
    settled = await house.settled()
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_REFUSED, "INVALID_DIMENSIONS")


async def test_nothing_leaves_before_the_intent_is_durable(house: House) -> None:
    house.control.hold["AwaitIntent"] = asyncio.Event()
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", "a"))
        await house.control.arrived["AwaitIntent"].wait()
        await until(lambda: bool(house.worker.submits))
        await asyncio.sleep(0.05)
        assert not asked.done()
        house.control.hold["AwaitIntent"].set()
        assert (await asked).receipt.audit_sequence == 8


async def test_no_answer_without_a_durable_outcome(house: House) -> None:
    house.control.refuse["Settle"] = CloisterError("AUDIT_BLOCKED", "x", grpc.StatusCode.UNAVAILABLE)
    async with house.client() as client:
        error = await failure(client.embed("notes", "a"))
    assert (error.status, error.code) == (grpc.StatusCode.UNAVAILABLE, "AUDIT_BLOCKED")
    house.control.refuse.clear()  # it is tried again in the background


async def test_what_control_refuses_is_passed_on_as_it_is(house: House) -> None:
    house.control.refuse["Authorize"] = CloisterError(
        "CAPABILITY_MISSING", "the model answers generate", grpc.StatusCode.FAILED_PRECONDITION
    )
    async with house.client() as client:
        error = await failure(client.rerank("notes", "q", ["a"]))
    assert (error.status, error.code) == (grpc.StatusCode.FAILED_PRECONDITION, "CAPABILITY_MISSING")
    assert house.text.requests == []


async def test_a_client_that_goes_away_mid_way_aborts_every_input_that_is_left(house: House) -> None:
    house.worker.script = after(3, computed, silence)
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", ["a"] * 10))
        await until(lambda: len(house.worker.submits) == 10)
        asked.cancel()
        settled = await house.settled()
    await until(lambda: len(house.worker.aborts) == 7)
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_CANCELLED, "CANCELLED")
    assert settled.prompt_tokens == 3, "as the worker says, input by input"
    assert set(house.worker.aborts) == {submit.handle for submit in house.worker.submits[3:]}


async def test_a_deadline_aborts_every_input_and_is_recorded_as_one(house: House) -> None:
    house.worker.script = after(1, computed, silence)
    async with house.client() as client:
        error = await failure(client.embed("notes", ["a"] * 4, timeout=0.4))
    assert error.code == "DEADLINE_EXCEEDED"
    settled = await house.settled()
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_DEADLINE, "DEADLINE_EXCEEDED")
    await until(lambda: len(house.worker.aborts) == 3)


async def test_an_error_of_the_engine_over_one_input_ends_all_and_names_it(house: House) -> None:
    async def faulty(submit: Any, send: Send) -> None:
        if len(submit.token_ids) != 5:
            await silence(submit, send)
        send(end=end(engine_pb2.END_REASON_ERROR, error_reason="NUMERIC_FAULT", error_message="NaN"))

    house.worker.script = after(1, computed, faulty)
    async with house.client() as client:
        error = await failure(client.embed("notes", ["a", "abcde", "abc"]))
    assert (error.status, error.code, error.field) == (grpc.StatusCode.INTERNAL, "NUMERIC_FAULT", "inputs[1]")
    await until(lambda: len(house.worker.aborts) == 1)
    assert (await house.settled()).outcome == control_pb2.OUTCOME_ENGINE_FAILED


async def test_that_the_worker_drains_is_not_held_against_an_input(house: House) -> None:
    async def draining(submit: Any, send: Send) -> None:
        send(end=end(engine_pb2.END_REASON_ERROR, error_reason="WORKER_DRAINING", error_message="it is stopped"))

    house.worker.script = draining
    async with house.client() as client:
        error = await failure(client.embed("notes", "a"))
    assert (error.status, error.code) == (grpc.StatusCode.UNAVAILABLE, "WORKER_DRAINING")
    assert (error.field, error.message) == (None, "it is stopped")


async def test_a_worker_that_answers_without_a_vector_is_an_engine_error(house: House) -> None:
    async def empty(submit: Any, send: Send) -> None:
        send(end=end())

    house.worker.script = empty
    async with house.client() as client:
        error = await failure(client.embed("notes", "a"))
    assert (error.status, error.code) == (grpc.StatusCode.INTERNAL, "ENGINE_ERROR")


@pytest.mark.parametrize(
    ("answered", "status", "code"),
    [
        (0, grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
        (2, grpc.StatusCode.ABORTED, "ENGINE_RESTARTED"),
    ],
)
async def test_a_worker_killed_before_its_first_answer_is_unavailable_and_after_it_aborts(
    house: House, answered: int, status: grpc.StatusCode, code: str
) -> None:
    house.worker.script = after(answered, computed, silence)
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", ["a"] * 5))
        await until(lambda: len(house.worker.submits) == 5)
        await asyncio.sleep(0.05)  # what was answered is on its way
        await house.kill("worker-notes")
        error = await failure(asked)
    assert (error.status, error.code) == (status, code)
    settled = await house.settled()
    assert (settled.outcome, settled.prompt_tokens) == (control_pb2.OUTCOME_ENGINE_FAILED, answered)
    assert len(house.control.asked("Admit")) == 1, "an admitted request is not sent again"


async def test_a_batch_that_the_worker_died_over_is_one_suspect_and_one_convict(house: House) -> None:
    batch = ["a", "b", "ab", "abc"]
    for code in ("ENGINE_UNAVAILABLE", "ENGINE_UNAVAILABLE", "REQUEST_QUARANTINED"):
        house.worker.script = silence
        before = len(house.worker.submits)
        async with house.client() as client:
            asked = asyncio.create_task(client.embed("notes", batch, retry=False))
            if code != "REQUEST_QUARANTINED":
                await until(lambda: len(house.worker.submits) == before + 4)  # noqa: B023  # awaited here
                await house.kill("worker-notes")
            error = await failure(asked)
        assert error.code == code
        if "worker-notes" not in house.servers:
            await house.start_worker()
    house.worker.script = computed
    async with house.client() as client:
        assert len((await client.embed("notes", batch[:3])).vectors) == 3, (
            "another request is none of its business"
        )


async def test_a_suspect_batch_is_cleared_once_every_input_came_to_its_end(house: House) -> None:
    known = quarantine.Quarantine()
    fingerprint = b"f"
    known.strike(fingerprint, 1, convicted=False)
    passage = await known.enter("notes", "s1", fingerprint)
    passage.divide(3)
    passage.survived()
    passage.survived()
    assert passage.held, "the others wait until it is through"
    passage.survived()
    assert not passage.held
    assert (await known.enter("notes", "s1", fingerprint)).strikes == 0
    known.strike(fingerprint, 1, convicted=False)
    passage = await known.enter("notes", "s1", fingerprint)
    passage.divide(2)
    passage.left()
    passage.survived()
    assert (await known.enter("notes", "s1", fingerprint)).strikes == 1, "an input that left proves nothing"


async def test_a_batch_whose_lease_control_has_closed_ends_at_once(house: House) -> None:
    house.worker.script = after(1, computed, silence)
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", ["a"] * 3))
        await until(lambda: len(house.worker.submits) == 3)
        house.control.closed_leases = ["lease-ticket"]
        error = await failure(asked)
    assert (error.status, error.code) == (grpc.StatusCode.ABORTED, "LEASE_CLOSED")
    await until(lambda: len(house.worker.aborts) == 2)


async def test_a_gateway_that_drains_finishes_a_batch_and_takes_no_other(house: House) -> None:
    proceed = asyncio.Event()

    async def waiting(submit: Any, send: Send) -> None:
        await proceed.wait()
        await computed(submit, send)

    house.worker.script = waiting
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", ["a", "b"]))
        await until(lambda: len(house.worker.submits) == 2)
        draining = asyncio.create_task(house.gateway.drain())
        await asyncio.sleep(0.05)
        error = await failure(client.embed("notes", "c", retry=False))
        proceed.set()
        assert len((await asked).vectors) == 2
        await draining
    assert error.code == "DRAINING"


async def test_a_tenants_batch_is_one_of_its_requests_at_once(house: House) -> None:
    house.worker.script = silence
    house.control.max_concurrent = 1
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", ["a"] * 8))
        await until(lambda: len(house.worker.submits) == 8)
        error = await failure(client.embed("notes", "b", retry=False))
        asked.cancel()
        await house.settled()
    assert error.code == "TENANT_CONCURRENCY"


async def test_the_synchronous_client_gets_the_same_and_knows_what_it_sends(house: House) -> None:
    known = str(uuid.uuid4())

    def ask() -> tuple[Embeddings, Any]:
        with Client(
            house.gateway.address,
            ca=AUTHORITY.pem,
            certificate=CLIENT.certificate,
            key=CLIENT.key,
            api_key=API_KEY,
        ) as client:
            with pytest.raises(TypeError):
                client.rerank("notes", "q", "one text")
            with pytest.raises(TypeError, match="temperature"):
                client.embed("notes", "q", temperature=0)  # type: ignore[call-arg]  # that is the test
            return client.embed("notes", ["abc"], request_id=known), client.rerank("notes", "q", ["a", "abc"])

    embeddings, ranking = await asyncio.to_thread(ask)
    assert embeddings.request_id == embeddings.receipt.request_id == known
    assert embeddings.vectors[0] == pytest.approx((0.6, 0.0, 0.8))
    assert [one.index for one in ranking.results] == [1, 0]
    assert house.control.asked("Authorize")[0].request_id == known


async def test_an_answer_may_be_larger_than_grpc_takes_by_default(house: House) -> None:
    async def wide(submit: Any, send: Send) -> None:
        send(end=end(prompt_tokens=1), values=[1.0] * 8192)

    house.worker.script = wide
    async with house.client() as client:
        answer = await client.embed("notes", ["a"] * 256)
    assert sum(map(len, answer.vectors)) == 256 * 8192, "8 MiB"


async def test_the_prompt_in_the_record_can_be_computed_again(house: House) -> None:
    async with house.client() as client:
        await client.embed("notes", ["ä b", [1, 2]])
        await client.rerank("notes", "q", ["x", "y"])
    digests = [admitted.prompt_sha256.hex() for admitted in house.control.asked("Admit")]
    # printf '["ä b",[1,2]]' | sha256sum; printf '["q",["x","y"]]' | sha256sum
    assert digests == [EMBED_SHA256, RERANK_SHA256]


EMBED_SHA256 = "c3d77f62adc3b29dfe17f249ccce864228bac1a8384b6d23b8a32fb048bd9d4b"
RERANK_SHA256 = "6fd7273213b263ec6539b5e9c9e834e2dbb5136979313f39eeea43a2eb9ecfb9"
