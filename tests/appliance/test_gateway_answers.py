"""Several answers, log probabilities, tokens and back: what a client asks of a real gateway, and what it gets."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from appliance.client import CloisterError
from appliance.gateway import events
from appliance.protos import control_pb2, inference_pb2, inference_pb2_grpc
from engine.protos import engine_pb2
from tests.appliance.gateway_house import API_KEY, CONTEXT, House, Send, end, open_house, say, silence
from tests.appliance.pki import IDENTITY

KEY_METADATA = (("authorization", f"Bearer {API_KEY}"),)
LENGTH = engine_pb2.END_REASON_LENGTH


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


def judged(token: int, top: int = 0) -> Any:
    """What the stand-in's model thinks of a token."""
    likeliest = [engine_pb2.TopLogprob(token_id=rank, logprob=-0.5 * rank - 0.25) for rank in range(top)]
    return engine_pb2.TokenLogprob(token_id=token, logprob=-1.5, rank=token + 1, top=likeliest)


async def two_answers(submit: Any, send: Send) -> None:
    """A script: two answers whose rows alternate; the second is longer and cut short."""
    send("a", [1], index=0)
    send("x", [2], index=1)
    send("b", [3], index=0)
    first = {"prompt_tokens": 3, "completion_tokens": 3, "queue_ns": 1_000_000_000, "prefill_ns": 4_000_000_000}
    send(end=end(stop_token_id=9, cached_prompt_tokens=2, preemptions=1, recomputed_tokens=4, **first), index=0)
    send("y", [4], index=1)
    second = {"prompt_tokens": 3, "completion_tokens": 2, "queue_ns": 1_000_000_000, "prefill_ns": 2_000_000_000}
    send(end=end(LENGTH, recomputed_tokens=5, **second), index=1)


async def test_several_answers_come_apart_and_are_paid_together(house: House) -> None:
    house.worker.script = two_answers
    async with house.client() as client:
        stream = client.generate("notes", "abc", n=2, max_tokens=5)
        deltas = [(delta.index, delta.text) async for delta in stream.deltas()]
    assert deltas == [(0, "a"), (1, "x"), (0, "b"), (1, "y")]
    assert [answer.text for answer in stream.answers] == ["ab", "xy"]
    assert [answer.finished.reason for answer in stream.answers] == ["stop", "length"]
    usage = stream.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 5)
    assert (usage.cached_prompt_tokens, usage.recomputed_tokens) == (2, 9)
    timings = stream.completed.timings
    assert (timings.prefill.total_seconds(), timings.time_to_first_token.total_seconds()) == (4, 3)
    assert timings.preemptions == 1
    (submit,) = house.worker.submits
    assert submit.n == 2
    (admit,) = house.control.asked("Admit")
    assert (admit.prompt_tokens, admit.max_tokens, admit.answers) == (3, 5, 2)
    assert admit.parameters["n"] == "2"
    settled = await house.settled()
    assert (settled.outcome, settled.finish_reason) == (control_pb2.OUTCOME_COMPLETED, "length")
    assert (settled.prompt_tokens, settled.completion_tokens) == (3, 5)


async def test_each_answer_is_finished_once_and_completed_comes_last(house: House) -> None:
    house.worker.script = two_answers
    async with house.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(model="notes", text="abc")
        request.sampling.n = 2
        found = [event async for event in stub.Generate(request, metadata=KEY_METADATA)]
    kinds = [event.WhichOneof("event") for event in found]
    assert kinds == ["accepted", "delta", "delta", "delta", "finished", "delta", "finished", "completed"]
    assert [event.finished.index for event in found if event.HasField("finished")] == [0, 1]


async def test_the_text_of_several_answers_is_not_given_as_if_it_were_one(house: House) -> None:
    house.worker.script = two_answers
    async with house.client() as client:
        with pytest.raises(ValueError, match="deltas"):
            await anext(client.generate("notes", "abc", n=2))
        completion = await client.generate("notes", "abc", n=2).result()
    assert [(choice.index, choice.text) for choice in completion.choices] == [(0, "ab"), (1, "xy")]
    assert (completion.text, completion.finished.reason) == ("ab", "stop")


async def test_a_client_that_goes_away_ends_every_answer_and_pays_what_was_computed(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        send("a", [1], index=0)
        send(end=end(completion_tokens=5, prompt_tokens=3), index=2)
        await asyncio.Event().wait()

    house.worker.script = script
    async with house.client() as client:
        stream = client.generate("notes", "abc", n=3)
        assert [delta.index async for delta in _first(stream)] == [0]
        stream.cancel()
        await house.worker.aborted.wait()
    assert house.worker.aborts == [house.worker.submits[0].handle]
    settled = await house.settled()
    assert settled.outcome == control_pb2.OUTCOME_CANCELLED
    assert settled.completion_tokens == 5 + 2 + 2, "the worker's last word on each answer"


async def _first(stream: Any) -> AsyncIterator[Any]:
    async for delta in stream.deltas():
        yield delta
        return


async def test_one_answers_failure_ends_the_call_and_the_other_answers(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        send("a", [1], index=0)
        failed = end(engine_pb2.END_REASON_ERROR, error_reason="NUMERIC_FAULT", error_message="NaN logits")
        send(end=failed, index=1)
        await asyncio.Event().wait()

    house.worker.script = script
    async with house.client() as client:
        stream = client.generate("notes", "abc", n=2)
        with pytest.raises(CloisterError) as error:
            await stream.result()
    assert (error.value.code, stream.answers[0].text) == ("NUMERIC_FAULT", "a")
    await house.worker.aborted.wait()
    assert (await house.settled()).outcome == control_pb2.OUTCOME_ENGINE_FAILED


async def test_a_worker_that_sends_what_nobody_asked_for_loses_its_session_and_the_gateway_lives(
    house: House,
) -> None:
    async def script(submit: Any, send: Send) -> None:
        send("Hel", [1])
        send("lo", [2], index=5)

    house.worker.script = script
    async with house.client() as client:
        with pytest.raises(CloisterError, match="ENGINE_RESTARTED"):
            await client.generate("notes", "abc").result()
        house.worker.script = say("Hello")
        assert (await client.generate("notes", "abc").result()).text == "Hello"
    assert house.worker.sessions == 2


async def test_log_probabilities_come_with_their_tokens(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        send("Hel", [7], logprobs=[judged(7, submit.logprobs)])
        send("lo", [8], end(LENGTH), logprobs=[judged(8, submit.logprobs)])

    house.worker.script = script
    async with house.client() as client:
        answer = await client.generate("notes", "x", logprobs=2, return_token_ids=True).result()
        bare = await client.generate("notes", "x", logprobs=0).result()
    assert answer.token_ids == tuple(one.token_id for one in answer.logprobs) == (7, 8)
    assert [(one.logprob, one.rank) for one in answer.logprobs] == [(-1.5, 8), (-1.5, 9)]
    assert [(top.token_id, top.logprob) for top in answer.logprobs[0].top] == [(0, -0.25), (1, -0.75)]
    assert [one.top for one in bare.logprobs] == [(), ()]
    first, second = house.worker.submits
    assert (first.logprobs, second.logprobs, second.HasField("prompt_logprobs")) == (2, 0, False)


async def test_a_long_prompts_log_probabilities_come_first_in_bounded_messages_and_cut_nobody_off(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = CONTEXT - 1
    monkeypatch.setattr(events, "MAX_PROMPT_LOGPROBS", 16)
    monkeypatch.setattr("appliance.gateway.rows.MAX_PENDING_BYTES", 4096)
    house.control.hold["AwaitIntent"] = asyncio.Event()

    async def script(submit: Any, send: Send) -> None:
        send(prompt_logprobs=[judged(token, submit.prompt_logprobs) for token in range(1, prompt)])
        send("Hello", [1], end(LENGTH))

    house.worker.script = script
    async with house.client() as client:
        stream = client.generate("notes", "x" * prompt, prompt_logprobs=20)
        reading = asyncio.create_task(_deltas(stream))
        await house.control.arrived["AwaitIntent"].wait()
        await asyncio.sleep(0.1)
        house.control.hold["AwaitIntent"].set()
        deltas = await reading
    assert [len(delta.prompt_logprobs) for delta in deltas] == [16, 16, 16, 14, 0]
    assert deltas[-1].text == "Hello"
    assert [one.token_id for one in stream.prompt_logprobs] == list(range(1, prompt))
    assert all(len(one.top) == 20 for one in stream.prompt_logprobs)


async def _deltas(stream: Any) -> list[Any]:
    return [delta async for delta in stream.deltas()]


async def test_every_parameter_reaches_the_engine_and_the_record(house: House) -> None:
    async with house.client() as client:
        await client.generate(
            "notes", "x", min_p=0.5, frequency_penalty=-2.0, presence_penalty=2.0, repetition_penalty=1.5,
            logit_bias={9: -100.0, 3: 1.5}, min_tokens=4, max_tokens=6, logprobs=0, prompt_logprobs=1,
        ).result()  # fmt: skip
    (submit,) = house.worker.submits
    assert (submit.min_p, submit.frequency_penalty, submit.presence_penalty) == (0.5, -2, 2)
    assert (submit.repetition_penalty, submit.min_tokens, submit.n) == (1.5, 4, 1)
    assert [(one.token_id, one.bias) for one in submit.logit_bias] == [(3, 1.5), (9, -100)]
    assert (submit.logprobs, submit.prompt_logprobs) == (0, 1)
    (admit,) = house.control.asked("Admit")
    on_record = {
        "min_p": "0.5", "frequency_penalty": "-2", "presence_penalty": "2", "repetition_penalty": "1.5",
        "logit_bias": "2", "min_tokens": "4", "max_tokens": "6", "logprobs": "0", "prompt_logprobs": "1",
    }  # fmt: skip
    assert on_record.items() <= dict(admit.parameters).items()


async def test_what_is_left_out_is_off(house: House) -> None:
    async with house.client() as client:
        await client.generate("notes", "x").result()
    (submit,) = house.worker.submits
    assert (submit.min_p, submit.frequency_penalty, submit.presence_penalty) == (0, 0, 0)
    assert (submit.repetition_penalty, submit.n, submit.min_tokens) == (1, 1, 0)
    assert not submit.HasField("logprobs")
    assert not submit.HasField("prompt_logprobs")
    assert "n" not in house.control.asked("Admit")[0].parameters


async def test_an_answer_longer_than_the_context_leaves_cannot_be_demanded(house: House) -> None:
    async with house.client() as client:
        await client.generate("notes", "x" * (CONTEXT - 4), min_tokens=4).result()
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", "x" * (CONTEXT - 4), min_tokens=5).result()
    assert (error.value.code, error.value.field) == ("INVALID_STOP", "stopping.min_tokens")
    assert len(house.control.asked("Admit")) == 1


async def test_text_becomes_tokens_and_text_again_at_no_charge(house: House) -> None:
    async with house.client() as client:
        ids = await client.tokenize("notes", "Häuser")
        assert await client.detokenize("notes", ids) == "Häuser"
        assert await client.tokenize("notes", "", add_special_tokens=False) == ()
        assert await client.detokenize("notes", []) == ""
    assert ids == tuple(map(ord, "Häuser"))
    assert [r.add_special_tokens for r in (house.text.requests[0], house.text.requests[2])] == [True, False]
    methods = [request.method.rpartition("/")[2] for request in house.control.asked("Authorize")]
    assert methods == ["Tokenize", "Detokenize", "Tokenize", "Detokenize"]
    assert house.control.asked("Admit") == []


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (("tokenize", "", "x"), "MODEL_MISSING"),
        (("detokenize", "", [1]), "MODEL_MISSING"),
        (("tokenize", "notes", "y" * (CONTEXT * 128 + 1)), "CONTEXT_OVERFLOW"),
        (("detokenize", "notes", [1] * (CONTEXT + 1)), "CONTEXT_OVERFLOW"),
        (("tokenize", "notes", "y" * (1 << 20)), "REQUEST_TOO_LARGE"),
        (("detokenize", "notes", [1 << 31] * (1 << 18)), "REQUEST_TOO_LARGE"),
    ],
)
async def test_what_cannot_be_a_prompt_is_not_tokenised_either(
    house: House, call: tuple[str, str, Any], code: str
) -> None:
    name, model, content = call
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await getattr(client, name)(model, content)
    assert (error.value.code, error.value.status) == (code, grpc.StatusCode.INVALID_ARGUMENT)
    assert [(r.caller.identity, r.reason) for r in house.control.asked("RecordRefusal")] == [(IDENTITY, code)]
    assert house.text.requests == []


async def test_engine_texts_refusal_of_a_token_keeps_its_code(house: House) -> None:
    house.text.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_OUT_OF_RANGE: id 9 is not in the vocabulary")
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.detokenize("notes", [9])
    assert error.value.code == "TOKEN_OUT_OF_RANGE"


async def test_tokenising_takes_one_of_the_tenants_slots(house: House) -> None:
    house.control.max_concurrent = 1
    house.worker.script = silence
    async with house.client() as client:
        running = asyncio.create_task(client.generate("notes", "x").result())
        while not house.worker.submits:
            await asyncio.sleep(0.02)
        with pytest.raises(CloisterError) as error:
            await client.tokenize("notes", "x", retry=False)
        assert error.value.code == "TENANT_CONCURRENCY"
        running.cancel()


async def test_a_tenants_texts_wait_behind_its_own_and_not_before_anothers(house: House) -> None:
    house.text.free.clear()
    async with house.client() as client:
        many = [asyncio.create_task(client.tokenize("notes", "a")) for _ in range(10)]
        while len(house.text.requests) < 2:
            await asyncio.sleep(0.01)
        given_up = asyncio.create_task(client.generate("notes", "a").result())
        await asyncio.sleep(0.1)
        assert len(house.text.requests) == 2
        house.control.scope = "s2"
        other = asyncio.create_task(client.generate("notes", "b").result())
        while len(house.text.requests) < 3:
            await asyncio.sleep(0.01)
        assert house.text.requests[2].text == "b"
        given_up.cancel()
        house.text.free.set()
        assert (await other).text == "Hello"
        assert await asyncio.gather(*many) == [(ord("a"),)] * 10
    assert len(house.gateway._texts._places) == 0


def test_numbers_that_are_none_are_within_no_bounds() -> None:
    from appliance.gateway.parameters import _RANGES

    assert not [name for name, (fits, _) in _RANGES.items() if fits(math.nan) or fits(math.inf) or fits(-math.inf)]
