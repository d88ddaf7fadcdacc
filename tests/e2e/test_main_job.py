"""The main job: a signed bundle in, tokens out, through every real process."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from appliance.client import AsyncClient
from benchmarks.demo_models.notes import draw
from tests.e2e.appliance import ALIAS, Appliance

BUF = Path(sys.executable).with_name("buf")


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
