"""A request that kills the engine twice is found out and kept away; those beside it are not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from appliance.client import CloisterError
from appliance.gateway import quarantine
from appliance.gateway.quarantine import HOLD_S, TERM_S, Passage, Quarantine, fingerprint_of
from appliance.gateway.sessions import Sessions
from appliance.protos import control_pb2, inference_pb2, inference_pb2_grpc
from engine.protos import engine_pb2
from tests.appliance.gateway_house import API_KEY, House, Send, end, one_word_then_silence, open_house, say
from tests.appliance.pki import IDENTITY

KILLER = "kkkkkkk"
KEY_METADATA = (("authorization", f"Bearer {API_KEY}"),)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


def lengths(house: House) -> list[int]:
    """Prompts the worker was given, by length: the stand-in makes one token of each character."""
    return [len(submit.token_ids) for submit in house.worker.submits]


def marks(house: House) -> Any:
    """What the gateway holds against requests."""
    return house.gateway._service._neighbours.quarantine._marks


async def killed_over(house: House, *texts: str) -> None:
    """The worker dies while it has just these requests, and is started again."""
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        streams = [client.generate("notes", text) for text in texts]
        for stream in streams:
            assert await anext(stream) == "Hel"
        await house.kill("worker-notes")
        for stream in streams:
            with pytest.raises(CloisterError, match="ENGINE_RESTARTED"):
                await anext(stream)
    await house.start_worker()
    house.worker.script = say("Hello")


async def answer(house: House, text: str, **options: Any) -> str:
    async with house.client() as client:
        return (await client.generate("notes", text, **options).result()).text


async def test_a_request_that_killed_the_engine_twice_is_refused_and_recorded(house: House) -> None:
    await killed_over(house, KILLER)
    await killed_over(house, KILLER)
    async with house.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model="notes", text=KILLER), metadata=KEY_METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            _ = [event async for event in call]
        assert dict(await call.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "-1"
    assert failed.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(CloisterError) as error:
        await answer(house, KILLER)
    assert (error.value.code, error.value.retry_after) == ("REQUEST_QUARANTINED", None)
    assert KILLER not in str(error.value)
    refused = [(r.caller.identity, r.reason) for r in house.control.asked("RecordRefusal")]
    assert refused[0] == (IDENTITY, "REQUEST_QUARANTINED")
    assert lengths(house) == [len(KILLER)] * 2
    assert len(house.control.asked("Admit")) == 2
    assert await answer(house, "another one") == "Hello"


async def test_those_that_were_twice_beside_a_killer_are_cleared_and_the_killer_is_convicted(house: House) -> None:
    await killed_over(house, KILLER, "a", "bb", "ccc")
    running: set[int] = set()
    together: list[set[int]] = []
    killed = asyncio.Event()

    async def script(submit: Any, send: Send) -> None:
        length = len(submit.token_ids)
        running.add(length)
        together.append(set(running))
        if length == len(KILLER):
            killed.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0.05)
        running.discard(length)
        await say("Hello")(submit, send)

    house.worker.script = script
    async with house.client() as client:
        again = [asyncio.create_task(client.generate("notes", t).result()) for t in ("a", KILLER, "bb", "ccc")]
        await killed.wait()
        assert await answer(house, "not suspected at all") == "Hello"
        await house.kill("worker-notes")
        running.clear()
        await house.start_worker()
        results = await asyncio.gather(*again, return_exceptions=True)
        assert all(len(these & {1, 2, 3, len(KILLER)}) <= 1 for these in together), "suspects ran together"
        assert [index for index, result in enumerate(results) if isinstance(result, CloisterError)] == [1]
        with pytest.raises(CloisterError, match="REQUEST_QUARANTINED"):
            await client.generate("notes", KILLER).result()
    await killed_over(house, "a", "bb", "ccc")
    assert [await answer(house, text) for text in ("a", "bb", "ccc")] == ["Hello"] * 3


async def test_a_suspect_waits_for_the_one_before_it_but_not_for_long(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "WAIT_S", 0.2)
    await killed_over(house, "a", "bb")
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        first = client.generate("notes", "a")
        assert await anext(first) == "Hel"
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", "bb", retry=False).result()
        assert (error.value.status, error.value.code) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_SUSPECTS_BUSY")
        assert error.value.retry_after is not None
        assert lengths(house)[2:] == [1], "the other one has not reached the worker again"
        first.cancel()
        await house.worker.aborted.wait()
        house.worker.script = say("Hello")
        assert (await client.generate("notes", "bb").result()).text == "Hello"


async def test_a_tenants_suspects_keep_no_other_tenant_waiting(house: House) -> None:
    await killed_over(house, "a")
    house.control.scope = "s2"
    await killed_over(house, "a")
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        first = client.generate("notes", "a")
        assert await anext(first) == "Hel"
        house.control.scope = "s1"
        house.worker.script = say("Hello")
        assert await asyncio.wait_for(answer(house, "a"), quarantine.WAIT_S / 2) == "Hello"
        first.cancel()


async def test_who_waits_for_its_turn_may_go_away(house: House) -> None:
    await killed_over(house, "a", "bb")
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        first = client.generate("notes", "a")
        assert await anext(first) == "Hel"
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", "bb", timeout=0.3).result()
        assert error.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
        house.worker.script = say("Hello")
        first.cancel()
        assert (await client.generate("notes", "bb").result()).text == "Hello"


@pytest.mark.parametrize("refused", ["Admit", "AwaitIntent"])
async def test_a_suspect_that_control_refuses_leaves_its_place(house: House, refused: str) -> None:
    await killed_over(house, "a", "bb")
    house.control.refuse_once[refused] = CloisterError("LIMIT", "x", grpc.StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(CloisterError, match="LIMIT"):
        await answer(house, "a")
    assert await asyncio.wait_for(answer(house, "bb"), quarantine.WAIT_S / 2) == "Hello"
    await _until(lambda: not house.gateway._service._neighbours.quarantine._places)


async def test_a_suspect_of_which_one_answer_came_to_no_end_is_not_cleared(house: House) -> None:
    async def half(submit: Any, send: Send) -> None:
        send("Hel", [1], index=0)
        send(end=end(), index=0)
        await asyncio.Event().wait()

    house.worker.script = one_word_then_silence
    async with house.client() as client:
        stream = client.generate("notes", "a", n=2)
        assert await anext(stream.deltas())
        await house.kill("worker-notes")
        await asyncio.gather(stream.result(), return_exceptions=True)
        await house.start_worker()
        house.worker.script = half
        again = client.generate("notes", "a", n=2)
        assert await anext(again.deltas())
        again.cancel()
        await house.worker.aborted.wait()
        await _until(lambda: not house.gateway._service._neighbours.quarantine._places)
    assert len(marks(house)) == 1


async def test_a_suspect_that_is_forgotten_leaves_its_place(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.gateway.sessions._MOST_GIVEN_UP", 1)
    known = Quarantine()
    await suspects(known, b"f")
    sessions = Sessions()
    session = await sessions.open(str(house.home / "run" / "worker-notes.sock"))
    house.worker.script, house.worker.deaf = one_word_then_silence, True
    for name in (b"f", b"other"):
        session.release(session.submit(engine_pb2.Submit(token_ids=[1], n=1), await enter(known, name)))
    assert await is_let_in(known, b"f")
    await sessions.close()


async def test_a_request_the_engine_brought_to_its_end_is_no_suspect_any_more(house: House) -> None:
    await killed_over(house, "a")
    assert await answer(house, "a") == "Hello"
    await killed_over(house, "a")
    assert await answer(house, "a") == "Hello"


async def test_a_worker_that_drains_strikes_nobody(house: House) -> None:
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        for _ in range(3):
            stream = client.generate("notes", "a")
            assert await anext(stream) == "Hel"
            house.worker.drained()
            with pytest.raises(CloisterError, match="ENGINE_RESTARTED"):
                await anext(stream)
        house.worker.script = say("Hello")
        assert (await client.generate("notes", "a").result()).text == "Hello"


async def test_a_client_that_gave_up_before_the_wedged_engine_was_killed_is_struck_all_the_same(
    house: House,
) -> None:
    house.worker.deaf = True
    for _ in range(2):
        house.worker.script = one_word_then_silence
        async with house.client() as client:
            with pytest.raises(CloisterError, match="DEADLINE_EXCEEDED"):
                await client.generate("notes", "a", timeout=0.3).result()
            while len(house.control.asked("Settle")) < len(house.control.asked("Admit")):
                await asyncio.sleep(0.02)
            await house.kill("worker-notes")
            await house.start_worker()
    with pytest.raises(CloisterError, match="REQUEST_QUARANTINED"):
        await answer(house, "a")


async def test_an_error_that_the_engine_survives_is_no_strike(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        send(end=end(engine_pb2.END_REASON_ERROR, error_reason="ENGINE_STEP_FAILED", error_message="x"))

    house.worker.script = script
    for _ in range(3):
        with pytest.raises(CloisterError, match="ENGINE_STEP_FAILED"):
            await answer(house, "a")
    house.worker.script = say("Hello")
    assert await answer(house, "a") == "Hello"


async def test_neither_another_tenant_nor_another_model_nor_other_tokens_are_the_same_request(
    house: House,
) -> None:
    await killed_over(house, KILLER)
    await killed_over(house, KILLER)
    house.control.scope = "s2"
    assert await answer(house, KILLER) == "Hello"
    house.control.scope, house.control.digest = "s1", "e" * 64
    assert await answer(house, KILLER) == "Hello"
    house.control.digest = "d" * 64
    assert await answer(house, KILLER + "k") == "Hello"
    assert await answer(house, KILLER, temperature=0.5) == "Hello"
    with pytest.raises(CloisterError, match="REQUEST_QUARANTINED"):
        await answer(house, KILLER)


async def enter(known: Quarantine, name: bytes, scope: str = "s1", deployment: str = "notes") -> Passage:
    """Let in without a wait; a test that would wait fails."""
    async with asyncio.timeout(0.2):
        return await known.enter(deployment, scope, name)


async def suspects(known: Quarantine, *names: bytes) -> None:
    """The worker dies over these, none of which it had before."""
    Passage.died([await enter(known, name) for name in names])


async def is_let_in(known: Quarantine, name: bytes, scope: str = "s1", deployment: str = "notes") -> bool:
    try:
        (await enter(known, name, scope, deployment)).left()
    except TimeoutError:
        return False
    return True


async def is_convicted(known: Quarantine, name: bytes) -> bool:
    try:
        (await enter(known, name)).left()
    except CloisterError as error:
        return error.code == "REQUEST_QUARANTINED"
    return False


async def test_a_convict_is_let_in_again_after_its_term() -> None:
    now = 0.0
    known = Quarantine(lambda: now)
    await suspects(known, b"f")
    Passage.died([await enter(known, b"f")])
    now = TERM_S - 1
    assert await is_convicted(known, b"f")
    now = TERM_S + 1
    assert await is_let_in(known, b"f")


async def test_a_death_counts_once_however_often_the_worker_had_the_request_and_a_passage_ends_once() -> None:
    known = Quarantine()
    await suspects(known, b"f", b"f")
    alone = await enter(known, b"f")
    alone.left()
    Passage.died([alone])
    (await enter(known, b"f")).survived()
    await suspects(known, b"f")
    assert not await is_convicted(known, b"f")


async def test_each_deployment_and_each_tenant_tries_its_own_suspects() -> None:
    known = Quarantine()
    await suspects(known, b"f", b"g", b"h")
    here = await enter(known, b"f")
    assert not await is_let_in(known, b"g")
    assert await is_let_in(known, b"g", scope="s2")
    assert await is_let_in(known, b"g", deployment="other")
    waiting = asyncio.create_task(known.enter("notes", "s1", b"g"))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    here.survived()
    (await waiting).left()
    assert len(known._places) == 0


async def test_of_suspects_of_several_tenants_none_is_convicted_until_it_is_known_which() -> None:
    known = Quarantine()
    await suspects(known, b"killer", b"other")
    Passage.died([await enter(known, b"killer", "s1"), await enter(known, b"other", "s2")])
    trial = await enter(known, b"killer", "s1")
    assert not await is_let_in(known, b"other", "s2"), "these two are tried one after the other"
    await suspects(known, b"third")
    assert await is_let_in(known, b"third", "s2"), "that no one-time suspect waits for"
    Passage.died([trial])
    assert await is_convicted(known, b"killer")
    (await enter(known, b"other", "s2")).survived()
    assert await is_let_in(known, b"other", "s2")
    assert len(known._places) == 0


async def test_who_is_answered_for_long_gives_its_place_to_the_next_and_stays_a_suspect() -> None:
    now = 0.0
    known = Quarantine(lambda: now)
    await suspects(known, b"long", b"next")
    long = await enter(known, b"long")
    now = 3 * HOLD_S
    assert not await is_let_in(known, b"next"), "a worker that has not answered may hang"
    long.answered()
    now += HOLD_S - 1
    long.answered()
    assert not await is_let_in(known, b"next")
    now += 1
    long.answered()
    beside = await enter(known, b"next")
    beside.left()
    assert len(known._places) == 0
    Passage.died([long])
    assert await is_convicted(known, b"long")
    assert not await is_convicted(known, b"next")


async def test_who_gives_up_waiting_for_one_place_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "WAIT_S", 0.05)
    known = Quarantine()
    await suspects(known, b"f", b"g")
    Passage.died([await enter(known, b"f", "s1"), await enter(known, b"g", "s2")])
    holder = await enter(known, b"f", "s1")
    with pytest.raises(CloisterError, match="ENGINE_SUSPECTS_BUSY"):
        await known.enter("notes", "s2", b"g")
    going = asyncio.create_task(known.enter("notes", "s2", b"g"))
    await asyncio.sleep(0.01)
    going.cancel()
    await asyncio.gather(going, return_exceptions=True)
    await suspects(known, b"h")
    assert await is_let_in(known, b"h", "s2")
    holder.left()
    assert len(known._places) == 0


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_MOST_MARKS", 10)
    known = Quarantine()
    for index in range(50):
        await suspects(known, b"%d" % index)
    assert len(known._marks) == 10
    assert b"49" in known._marks
    for index in range(40, 50):
        (await enter(known, b"%d" % index)).survived()
    assert (len(known._marks), len(known._places)) == (0, 0)


async def test_what_was_never_written_to_the_worker_is_not_held_against_a_request(house: House) -> None:
    """The worker stands still and its stream is full when it is killed."""
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        first = client.generate("notes", "a")
        assert await anext(first) == "Hel"
        (session,) = house.gateway._sessions._live.values()
        written = asyncio.Event()
        session._call.write = lambda command: written.wait()  # as when HTTP/2 has no window left
        second = asyncio.create_task(client.generate("notes", "bb", retry=False).result())
        await _until(lambda: session.num_running == 2)
        await house.kill("worker-notes")
        results = await asyncio.gather(second, first.result(), return_exceptions=True)
    assert [getattr(result, "code", "") for result in results] == ["ENGINE_UNAVAILABLE", "ENGINE_RESTARTED"]
    assert len(marks(house)) == 1, "only the one that the worker had"


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_fingerprint_holds_a_seed_only_when_the_client_chose_it() -> None:
    def of(seed: int, given: bool, **other: Any) -> bytes:
        return fingerprint_of("d", [engine_pb2.Submit(scope="s", token_ids=[1, 2], seed=seed, **other)], given)

    assert of(1, given=False) == of(2, given=False)
    assert of(1, given=True) != of(2, given=True)
    assert of(0, given=True) != of(0, given=False)
    assert of(1, given=True) == of(1, given=True)
    assert of(1, given=True) != of(1, given=True, max_tokens=3)


async def test_a_death_is_settled_as_before(house: House) -> None:
    await killed_over(house, "a")
    settled = await house.settled()
    assert (settled.outcome, settled.reason) == (control_pb2.OUTCOME_ENGINE_FAILED, "ENGINE_RESTARTED")
