"""What a session leaves unread: merged, bounded in bytes, told when it is too much."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.build import build_engine
from engine.launch import Launch
from engine.protos import engine_pb2
from engine.worker.engine_thread import EngineThread
from engine.worker.outbox import MAX_PENDING_BYTES, Outbox
from engine.worker.service import WorkerService
from engine.worker.translate import to_options
from tests.engine.sessions import LIMIT_S, OPTIONS, submit


async def test_a_session_that_reads_late_gets_one_merged_frame() -> None:
    outbox = Outbox()
    end = engine_pb2.End(reason=engine_pb2.END_REASON_LENGTH)
    outbox.push(1, [engine_pb2.Row(handle=1, token_ids=[5], text="a"), engine_pb2.Row(handle=2, token_ids=[6])])
    outbox.push(2, [engine_pb2.Row(handle=1, token_ids=[7], text="b")])
    outbox.push(3, [engine_pb2.Row(handle=1, token_ids=[8], text="c", end=end)])
    outbox.close()
    frame = await outbox.take()
    assert frame == engine_pb2.SessionResponse(
        step=3,
        rows=[
            engine_pb2.Row(handle=1, token_ids=[5, 7, 8], text="abc", end=end),
            engine_pb2.Row(handle=2, token_ids=[6]),
        ],
    )
    assert await outbox.take() is None


async def test_answers_to_one_prompt_are_merged_apart_with_their_log_probabilities() -> None:
    outbox = Outbox()
    one = engine_pb2.TokenLogprob(token_id=5, logprob=-1.0, rank=1, top=[engine_pb2.TopLogprob(token_id=5)] * 20)
    outbox.push(1, [engine_pb2.Row(handle=1, token_ids=[0], logprobs=[one])])
    outbox.push(2, [engine_pb2.Row(handle=1, prompt_logprobs=[one]), engine_pb2.Row(handle=1, index=1)])
    frame = await outbox.take()
    assert frame == engine_pb2.SessionResponse(
        step=2,
        rows=[
            engine_pb2.Row(handle=1, token_ids=[0], logprobs=[one], prompt_logprobs=[one]),
            engine_pb2.Row(handle=1, index=1),
        ],
    )


def judged(number: int, top: int = 20) -> engine_pb2.TokenLogprob:
    likeliest = [engine_pb2.TopLogprob(token_id=100_000 + i, logprob=-float(i)) for i in range(top)]
    return engine_pb2.TokenLogprob(token_id=number, logprob=-1.5, rank=3, top=likeliest)


@pytest.mark.parametrize(
    "rest",
    [{"text": "abcd"}, {"text": "long " * 2000}, {"logprobs": [judged(1)]}, {"prompt_logprobs": [judged(2)] * 99}],
    ids=["words", "text", "logprobs", "prompt"],
)
async def test_what_waits_unread_is_bounded_in_bytes_and_comes_whole_in_frames_that_pass(
    rest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    most, frame_bytes = 1 << 20, 1 << 18
    monkeypatch.setattr("engine.worker.outbox._FRAME_BYTES", frame_bytes)
    outbox, given = Outbox(most), []
    row_bytes = engine_pb2.Row(handle=1, token_ids=[1], **rest).ByteSize()
    while len(given) < most:  # never so many
        row = engine_pb2.Row(handle=1, index=len(given) % 2, token_ids=[len(given)], **rest)
        given.append(engine_pb2.Row.FromString(row.SerializeToString()))
        if not outbox.push(len(given), [row]):
            break
    assert len(given) * row_bytes < most + 3 * (row_bytes + 512)
    outbox.close()
    got: dict[int, engine_pb2.Row] = {0: engine_pb2.Row(), 1: engine_pb2.Row()}
    while (frame := await outbox.take()) is not None:
        assert frame.ByteSize() <= frame_bytes + 2 * row_bytes
        for part in frame.rows:
            text = got[part.index].text + part.text
            got[part.index].MergeFrom(part)
            got[part.index].text = text
    for index, whole in got.items():
        mine = [row for row in given if row.index == index]
        assert whole.token_ids == [token for row in mine for token in row.token_ids]
        assert whole.text == "".join(row.text for row in mine)
        assert whole.logprobs == [one for row in mine for one in row.logprobs]
        assert whole.prompt_logprobs == [one for row in mine for one in row.prompt_logprobs]


def test_unread_text_takes_memory_for_itself_and_not_for_each_of_its_beginnings() -> None:
    outbox, tokens = Outbox(), 8000
    before = resident_bytes()
    for number in range(tokens):
        assert outbox.push(number, [engine_pb2.Row(handle=1, token_ids=[number], text="word")])
    assert resident_bytes() - before < 4 * MAX_PENDING_BYTES * tokens // 60_000 + (8 << 20)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_one_step_alone_is_no_overflow_however_much_it_brings() -> None:
    outbox = Outbox(max_bytes=1000)
    assert outbox.push(1, [engine_pb2.Row(handle=1, prompt_logprobs=[judged(i) for i in range(100)])])
    assert not outbox.push(2, [engine_pb2.Row(handle=1, token_ids=[1])])


async def test_a_session_that_reads_nothing_loses_its_requests_and_is_told(
    tiny_store: tuple[Path, engine_pb2.FileSet],
) -> None:
    thread = await started(*tiny_store)
    service = WorkerService(thread, "cpu", max_pending_bytes=10_000)
    frames = service.Session(commands(submit(1, max_tokens=200), submit(2, max_tokens=200)), None)
    await anext(frames)
    async with asyncio.timeout(LIMIT_S):
        while thread.status().running or thread.status().waiting:
            await asyncio.sleep(0.01)
    late = await anext(frames)
    assert {row.handle: row.end.error_reason for row in late.rows} == {
        1: "SESSION_OVERFLOW",
        2: "SESSION_OVERFLOW",
    }
    assert sum(len(row.token_ids) for row in late.rows) <= 24
    await frames.aclose()
    status = thread.status()
    assert status.blocks_free + status.blocks_cached == status.blocks_total


async def started(store: Path, files: engine_pb2.FileSet) -> EngineThread:
    launch = Launch(engine_pb2.Deployment(name="tiny", files=files, options=OPTIONS), store, Path("unused"))
    thread = EngineThread(lambda: build_engine(launch.files, launch.open_file, to_options(OPTIONS)))
    thread.start()
    await asyncio.wrap_future(thread.built)
    return thread


async def test_what_a_session_sends_waits_while_it_reads_nothing_of_its_refusals(
    tiny_store: tuple[Path, engine_pb2.FileSet],
) -> None:
    sent = 0

    async def without_end() -> AsyncIterator[engine_pb2.SessionRequest]:
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield engine_pb2.SessionRequest(submit=submit(sent, ()))
            await asyncio.sleep(0)

    frames = WorkerService(await started(*tiny_store), "cpu", max_pending_bytes=10_000).Session(
        without_end(), None
    )
    refused = len((await anext(frames)).rows)
    for _ in range(5000):
        await asyncio.sleep(0)
    assert sent < 25
    async for frame in frames:  # all is refused once it is read, each once
        refused += len(frame.rows)
    assert (sent, refused) == (1000, 1000)


async def commands(*submits: engine_pb2.Submit) -> AsyncIterator[engine_pb2.SessionRequest]:
    """A client's side of a stream: these, and then nothing more for ever."""
    for command in submits:
        yield engine_pb2.SessionRequest(submit=command)
    await asyncio.Event().wait()
