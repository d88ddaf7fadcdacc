"""The rows of one request between the worker and its client: in order, merged when many, bounded, cut off."""

import pytest

from appliance.client import CloisterError
from appliance.gateway.rows import MAX_PENDING_BYTES, MERGE_AFTER, EngineGoneError, Rows
from engine.protos import engine_pb2
from tests.appliance.gateway_house import end


def a_row(text: str = "", ids: tuple[int, ...] = (1,), last: engine_pb2.End | None = None) -> engine_pb2.Row:
    return engine_pb2.Row(handle=1, text=text, token_ids=ids, end=last)


async def test_a_client_a_little_behind_gets_each_step_and_far_behind_gets_them_merged() -> None:
    rows = Rows(1, lambda: None)
    for index in range(MERGE_AFTER):
        rows.put(a_row(str(index % 10), (index,)))
    assert (await rows.next()).text == "0"
    rows.put(a_row("a"))
    rows.put(a_row("b", (), end(completion_tokens=MERGE_AFTER + 2)))
    merged = await rows.next()
    assert merged.text == "".join(str(index % 10) for index in range(1, MERGE_AFTER)) + "ab"
    assert list(merged.token_ids) == [*range(1, MERGE_AFTER), 1]
    assert merged.HasField("end")
    assert rows.completion_tokens == MERGE_AFTER + 2, "what the worker says, an end token included"


async def test_pending_rows_are_bounded_and_the_writer_is_interrupted() -> None:
    interrupted: list[bool] = []
    rows = Rows(1, lambda: None)
    rows.interrupt = lambda: interrupted.append(True)
    rows.put(a_row("y"))
    await rows.next()
    for _ in range(2 * MAX_PENDING_BYTES // 1024 + 1):
        rows.put(a_row("y" * 1024))
    assert interrupted == [True]
    with pytest.raises(CloisterError, match="SLOW_CLIENT"):
        await rows.next()


async def test_many_small_rows_are_merged_before_they_are_too_much() -> None:
    rows = Rows(1, lambda: None)
    rows.put(a_row("y"))
    await rows.next()
    for _ in range(20_000):
        rows.put(a_row("y"))
    assert rows.error is None
    assert (await rows.next()).text == "y" * 20_000


async def test_a_merged_row_stays_small_enough_for_one_message() -> None:
    rows = Rows(1, lambda: None)
    for _ in range(80):
        rows.put(a_row("y" * (64 << 10)))
    rows.put(a_row("", (), end(completion_tokens=80)))
    found = [await rows.next()]
    while not found[-1].HasField("end"):
        found.append(await rows.next())
    assert max(row.ByteSize() for row in found) < 1 << 20
    assert sum(len(row.text) for row in found) == 80 * (64 << 10)


async def test_rows_that_came_before_the_engine_went_are_delivered_first() -> None:
    rows = Rows(1, lambda: None)
    rows.put(a_row("a"))
    rows.fail(EngineGoneError())
    assert (await rows.next()).text == "a"
    with pytest.raises(EngineGoneError):
        await rows.next()


async def test_rows_far_behind_are_merged_by_answer() -> None:
    rows = Rows(1, lambda: None, answers=2)
    for token in range(40):
        rows.put(
            engine_pb2.Row(
                handle=1,
                index=token % 2,
                token_ids=[token],
                text=f"{token} ",
                logprobs=[engine_pb2.TokenLogprob(token_id=token, logprob=-1.5, rank=1)],
            )
        )
    rows.put(engine_pb2.Row(handle=1, index=1, end=end(completion_tokens=21)))
    first, second = await rows.next(), await rows.next()
    assert (first.index, list(first.token_ids)) == (0, list(range(0, 40, 2)))
    assert (second.index, list(second.token_ids)) == (1, list(range(1, 40, 2)))
    assert [one.token_id for one in second.logprobs] == list(range(1, 40, 2))
    assert (first.HasField("end"), second.HasField("end")) == (False, True)
    assert not rows.ended
    assert rows.completion_tokens == 20 + 21


async def test_the_rows_of_a_prompt_have_room_only_as_far_as_they_were_asked_for() -> None:
    rows = Rows(1, lambda: None, allowance=MAX_PENDING_BYTES)
    rows.put(engine_pb2.Row(handle=1, text="y"))
    await rows.next()
    for _ in range(15):
        rows.put(engine_pb2.Row(handle=1, text="y" * (MAX_PENDING_BYTES // 4)))
    assert rows.error is None
    rows.put(engine_pb2.Row(handle=1, text="y" * (MAX_PENDING_BYTES // 4)))
    assert isinstance(rows.error, CloisterError)
