"""The main job: a signed bundle in, tokens out, through every real process."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from appliance.client import AsyncClient, CloisterError
from benchmarks.demo_models.notes import draw
from tests.e2e.appliance import ALIAS, Appliance

BUF = Path(sys.executable).with_name("buf")


def tokens_used(appliance: Appliance) -> int:
    """By the one tenant that has an application."""
    return next(t["tokens_used"] for t in appliance.json("tenant", "list") if t["name"] == "ward-notes")


def test_a_tenant_streams_an_answer_with_a_receipt(appliance: Appliance) -> None:
    note = draw(7, 1, "unseen_values")[0]
    with appliance.client() as client:
        stream = client.chat(ALIAS, [{"role": "user", "content": note.prompt}], temperature=0)
        deltas = list(stream)
    assert len(deltas) > 1
    assert set(json.loads(stream.text)) == set(note.gold)
    assert stream.finished.reason == "stop"
    assert stream.usage.completion_tokens > 0
    assert stream.receipt.audit_sequence <= appliance.status()["audit_size"]


def test_every_one_of_32_concurrent_streams_is_bitwise_as_when_alone(appliance: Appliance) -> None:
    prompts = [note.prompt for note in draw(11, 32, "unseen_values")]

    async def one(client: AsyncClient, index: int) -> tuple[str, tuple[int, ...]]:
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": index} if index % 2 else {"temperature": 0.0}
        messages = [{"role": "user", "content": prompts[index]}]
        stream = client.chat(ALIAS, messages, return_token_ids=True, **sampled)
        text = "".join([delta async for delta in stream])
        return text, tuple(stream.token_ids)

    async def run() -> tuple[list[object], list[object]]:
        async with appliance.async_client() as client:
            alone: list[object] = [await one(client, i) for i in range(32)]
            together: list[object] = list(await asyncio.gather(*(one(client, i) for i in range(32))))
        return alone, together

    alone, together = asyncio.run(run())
    assert together == alone


def test_pages_and_reservations_are_held_while_a_stream_runs_and_returned_after_it(appliance: Appliance) -> None:
    with appliance.client() as client:
        stream = client.generate(ALIAS, text="hello", temperature=0, ignore_eos=True, max_tokens=200)
        next(stream)
        assert appliance.owned_pages() > 0
        assert appliance.status()["open_leases"] == 1
        list(stream)
    status = appliance.status()
    assert (status["open_leases"], status["reserved_tokens"], appliance.owned_pages()) == (0, 0, 0)


def test_several_answers_are_each_what_they_are_alone_and_share_one_prompt(appliance: Appliance) -> None:
    note = draw(13, 1, "unseen_values")[0].prompt
    sampled = {"temperature": 1.2, "seed": 5, "max_tokens": 24}
    with appliance.client() as client:
        stream = client.generate(ALIAS, note, n=4, return_token_ids=True, **sampled)
        indexes = [delta.index for delta in stream.deltas()]
        again = client.generate(ALIAS, note, n=4, return_token_ids=True, **sampled).result()
        greedy = client.generate(ALIAS, note, n=3, temperature=0, max_tokens=24).result()
    assert set(indexes) == {0, 1, 2, 3}
    assert [answer.token_ids for answer in stream.answers] == [choice.token_ids for choice in again.choices]
    assert len({answer.token_ids for answer in stream.answers}) > 1, "each is drawn by itself"
    assert len({choice.text for choice in greedy.choices}) == 1
    usage = stream.usage
    assert usage.completion_tokens == sum(len(answer.token_ids) for answer in stream.answers)
    assert usage.prompt_tokens == stream.accepted.prompt_tokens
    assert again.completed.usage.cached_prompt_tokens > 0, "the tenant's own prompt is not computed twice"


def test_log_probabilities_are_those_of_the_tokens_that_stand_there(appliance: Appliance) -> None:
    prompt = "ward 3, bed 4: temperature 38.2"
    with appliance.client() as client:
        ids = client.tokenize(ALIAS, prompt)
        answer = client.generate(
            ALIAS, prompt, temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2, return_token_ids=True
        ).result()
        told = client.generate(
            ALIAS, token_ids=[*ids, *answer.token_ids], temperature=0, max_tokens=1, prompt_logprobs=0
        ).result()
    assert [one.token_id for one in answer.prompt_logprobs] == list(ids[1:])
    assert [one.token_id for one in answer.logprobs][: len(answer.token_ids)] == list(answer.token_ids)
    for one in answer.logprobs:
        assert (one.rank, one.top[0].token_id, len(one.top)) == (1, one.token_id, 3), "greedy takes the likeliest"
        assert 0 >= one.top[0].logprob >= one.top[1].logprob >= one.top[2].logprob
    as_prompt = told.prompt_logprobs[len(ids) - 1 :]
    assert [one.token_id for one in as_prompt] == list(answer.token_ids)
    for drawn, read in zip(answer.logprobs, as_prompt, strict=False):
        assert abs(drawn.logprob - read.logprob) < 1e-3, (
            "the model thinks the same of a token it drew and one it reads"
        )


def test_bias_penalties_and_length_change_what_is_drawn(appliance: Appliance) -> None:
    with appliance.client() as client:
        plain = client.generate(ALIAS, "hello", temperature=0, max_tokens=8, return_token_ids=True).result()
        likeliest = plain.token_ids[0]
        banned = client.generate(
            ALIAS, "hello", temperature=0, max_tokens=8, logit_bias={likeliest: -100.0}, return_token_ids=True
        ).result()
        forced = client.generate(
            ALIAS, "hello", temperature=1, top_k=5, max_tokens=4, logit_bias={7: 100.0}, return_token_ids=True
        ).result()
        long = client.chat(
            ALIAS, [{"role": "user", "content": "hello"}], temperature=0, min_tokens=40, max_tokens=40
        ).result()
        with pytest.raises(CloisterError) as error:
            client.generate(ALIAS, "hello", logit_bias={1 << 31: 1.0}).result()
    assert likeliest not in banned.token_ids
    assert set(forced.token_ids) == {7}
    assert (long.finished.reason, long.completed.usage.completion_tokens) == ("length", 40)
    assert (error.value.status, error.value.code) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SAMPLING")


def test_text_becomes_tokens_and_text_again_and_costs_nothing(appliance: Appliance) -> None:
    text = "Bett 4, Müller: 38,2 °C <|user|>"
    used = tokens_used(appliance)
    with appliance.client() as client:
        ids = client.tokenize(ALIAS, text, add_special_tokens=False)
        assert client.detokenize(ALIAS, ids) == text, "control tokens in a text are text"
        assert client.generate(ALIAS, text, max_tokens=1).result().accepted.prompt_tokens == len(
            client.tokenize(ALIAS, text)
        )
    assert tokens_used(appliance) == used + len(ids) + 1
    printed = appliance.cloister("tokenize", ALIAS, "a b", "--credentials", str(appliance.credentials)).stdout
    shown = appliance.cloister(
        "detokenize", ALIAS, *printed.split(), "--credentials", str(appliance.credentials)
    ).stdout
    assert shown.strip() == "a b"


def test_the_example_written_with_a_key_runs_as_it_is(appliance: Appliance) -> None:
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=appliance.credentials, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_client_of_another_make_is_answered_from_the_proto_alone(appliance: Appliance) -> None:
    credentials = appliance.credentials
    body = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "stopping": {"maxTokens": 4}}
    done = subprocess.run(
        [str(BUF), "curl", "--schema", str(credentials / "inference.proto"), "--protocol", "grpc",
         "--cacert", str(credentials / "ca.pem"), "--cert", str(credentials / "client.pem"),
         "--key", str(credentials / "client.key"),
         "-H", f"authorization: Bearer {(credentials / 'api.key').read_text().strip()}",
         "-d", json.dumps(body),
         f"https://{(credentials / 'address').read_text().strip()}/cloister.inference.v1.InferenceService/Chat"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    decoder, rest, events = json.JSONDecoder(), done.stdout.strip(), []
    while rest:
        event, end = decoder.raw_decode(rest)
        events.append(event)
        rest = rest[end:].lstrip()
    assert "accepted" in events[0]
    assert "completed" in events[-1]


def test_the_audit_log_is_intact_and_closed(appliance: Appliance) -> None:
    verdict = appliance.json("audit", "verify")
    assert verdict["intact"] is True
    assert verdict["open_intents"] == 0
