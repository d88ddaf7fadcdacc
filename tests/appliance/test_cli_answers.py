"""generate, chat, embed, rerank, tokenize and detokenize on the command line, against a real gateway."""

import asyncio
import io
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.main import build_parser, main
from appliance.client.credentials import Credentials, write_credentials
from engine.protos import engine_pb2
from tests.appliance.gateway_house import API_KEY, AUTHORITY, CLIENT, House, Send, computed, end, open_house

LENGTH = engine_pb2.END_REASON_LENGTH


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    async with open_house() as opened:
        folder = tmp_path / "c"
        pair = (CLIENT.certificate, CLIENT.key)
        write_credentials(folder, Credentials(opened.gateway.address, AUTHORITY.pem, *pair, API_KEY))
        monkeypatch.setenv("CLOISTER_CREDENTIALS", str(folder))
        yield opened


async def run(*argv: str) -> int:
    return await asyncio.to_thread(main, argv)


async def three_answers(submit: Any, send: Send) -> None:
    """A script: the last answer ends first."""
    send("third\n", [3], end(LENGTH, completion_tokens=1), index=2)
    send("fir", [1], index=0)
    send("second\x1b[2J", [2], end(stop_token_id=9, completion_tokens=1), index=1)
    send("st", [1], end(LENGTH, completion_tokens=2), index=0)


async def test_several_answers_are_printed_whole_one_after_the_other(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    house.worker.script = three_answers
    assert await run("generate", "notes", "x", "-n", "3") == 0
    assert capsys.readouterr().out == (
        "--- answer 1 of 3, ended by length\nfirst\n"
        "--- answer 2 of 3, ended by stop\nsecond\\x1b[2J\n"
        "--- answer 3 of 3, ended by length\nthird\n"
    )


async def test_every_flag_reaches_the_engine(house: House) -> None:
    flags = (
        "--temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.25 --frequency-penalty -0.5 --presence-penalty 1 "
        "--repetition-penalty 1.25 --logit-bias 5=-2.5 --logit-bias 6=1 --seed 3 --max-tokens 9 --min-tokens 2 "
        "--stop a --stop b --stop-token-id 4 --ignore-eos --json --logprobs 3 --prompt-logprobs 0"
    )
    assert await run("chat", "notes", "hello", *flags.split()) == 0
    (submit,) = house.worker.submits
    numbers = (submit.temperature, submit.min_p, submit.frequency_penalty, submit.presence_penalty)
    assert numbers == (0.5, 0.25, -0.5, 1)
    assert (submit.repetition_penalty, submit.top_k, submit.seed) == (1.25, 7, 3)
    assert submit.top_p == pytest.approx(0.9)
    assert [(one.token_id, one.bias) for one in submit.logit_bias] == [(5, -2.5), (6, 1)]
    assert (submit.max_tokens, submit.min_tokens, submit.ignore_eos) == (9, 2, True)
    assert (list(submit.stop), list(submit.stop_token_ids)) == (["a", "b"], [4])
    assert (submit.logprobs, submit.prompt_logprobs) == (3, 0)


async def test_log_probabilities_are_in_the_events(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(submit: Any, send: Send) -> None:
        top = [engine_pb2.TopLogprob(token_id=4, logprob=-0.5)]
        send("x", [7], end(LENGTH), logprobs=[engine_pb2.TokenLogprob(token_id=7, logprob=-1.5, rank=2, top=top)])

    house.worker.script = script
    assert await run("--json", "generate", "notes", "x", "--logprobs", "1") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["accepted", "delta", "finished", "completed", "receipt"]
    assert events[1] == {
        "event": "delta", "index": 0, "text": "x", "token_ids": [7],
        "logprobs": [{"token_id": 7, "logprob": -1.5, "rank": 2, "top": [{"token_id": 4, "logprob": -0.5}]}],
    }  # fmt: skip
    assert events[3]["timings"]["preemptions"] == 0


async def test_log_probabilities_without_json_are_bad_usage(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run("generate", "notes", "x", "--logprobs", "1") == 2
    assert "--json" in capsys.readouterr().err
    assert house.worker.submits == []


async def test_tokens_of_a_text_and_text_of_tokens(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("tokenize", "notes", "hi") == 0
    assert await run("--json", "tokenize", "notes", "hi", "--no-special-tokens") == 0
    assert await run("detokenize", "notes", "104", "105", "27") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("104 105\n")
    assert printed.endswith("hi\\x1b\n")
    assert '"tokens": 2' in printed
    assert [request.add_special_tokens for request in house.text.requests[:2]] == [True, False]


async def test_vectors_are_lines_of_json_in_the_order_of_the_texts(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    house.worker.script = computed
    assert await run("embed", "notes", "abc", "a", "--no-normalize", "--dimensions", "1", "--stats") == 0
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == [
        {"index": 0, "values": [3.0], "prompt_tokens": 3, "truncated": False},
        {"index": 1, "values": [1.0], "prompt_tokens": 1, "truncated": False},
    ]
    assert printed.err == "4 tokens, computed in 2000 ms after 2000 ms, audit record 8\n"


async def test_texts_come_from_standard_input_a_line_each(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    house.worker.script = computed
    given = 'plain\u2028text\r\n\n"two\\nlines"\n"not closed\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert await run("embed", "notes", "-") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    asked = {request.text for request in house.text.requests}  # two at a time, in either order
    assert asked == {"plain\u2028text", "two\nlines", '"not closed'}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert await run("embed", "notes", "-") == 2


async def test_a_ranking_is_a_table_or_json(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.worker.script = computed
    assert await run("rerank", "notes", "q", "a", "abc\x1b", "x" * 70, "--top-n", "2") == 0
    assert capsys.readouterr().out.splitlines() == [
        "SCORE   INDEX  DOCUMENT", "5.0000      1  abc\\x1b", "2.0000      0  a",
    ]  # fmt: skip
    assert await run("--json", "rerank", "notes", "q", "a", "abc", "--truncate") == 0
    best, second = json.loads(capsys.readouterr().out)
    assert (best["index"], best["score"], second["index"]) == (1, 4.0, 0)
    assert house.text.requests[-1].truncate


async def test_an_input_that_is_refused_is_named(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("embed", "notes", "a", "x" * 9000) == 1
    assert "error: CONTEXT_OVERFLOW: inputs[1]: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "m", "t", "-n", "0"],
        ["generate", "m", "t", "-n", "9"],
        ["generate", "m", "t", "--min-p", "nan"],
        ["generate", "m", "t", "--logit-bias", "5"],
        ["generate", "m", "t", "--logit-bias", "x=1"],
        ["generate", "m", "t", "--logit-bias", "5=inf"],
        ["generate", "m", "t", "--json", "--logprobs", "21"],
        ["embed", "m"],
        ["embed", "m", "t", "--dimensions", "0"],
        ["rerank", "m", "q"],
        ["rerank", "m", "q", "d", "--top-n", "0"],
        ["detokenize", "m", "-1"],
        ["detokenize", "m"],
    ],
)
def test_a_value_out_of_range_is_bad_usage_before_anybody_is_asked(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser(words[0]).parse_args(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err
