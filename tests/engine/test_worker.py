"""engine-worker: sessions over one engine, as the real process on a tiny random Llama."""

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc
import pytest
import pytest_asyncio
import torch

from engine.errors import EngineError
from engine.launch import Launch
from engine.protos import engine_pb2, engine_pb2_grpc
from engine.worker import __main__ as worker_main
from engine.worker.translate import answer_seed
from kernels.native.library import load
from kernels.native.location import find_library
from tests.engine.processes import Running, refusal, running
from tests.engine.sessions import LIMIT_S, OPTIONS, Session, submit
from tests.engine.tiny_models import CONTEXT, VOCABULARY, into_store

CPU = "torch" if find_library() is None else "native"
KERNELS = CPU if CPU == "torch" else f"native {load().isa}"


@dataclass
class Worker:
    """A running worker and a channel to it."""

    running: Running
    channel: grpc.aio.Channel

    async def status(self) -> engine_pb2.GetStatusResponse:
        stub = engine_pb2_grpc.WorkerServiceStub(self.channel)
        return await stub.GetStatus(engine_pb2.GetStatusRequest())

    async def until_idle(self) -> engine_pb2.GetStatusResponse:
        """Wait for the engine to hold no request."""
        async with asyncio.timeout(LIMIT_S):
            while (status := await self.status()).running or status.waiting:
                await asyncio.sleep(0.01)
        return status


@asynccontextmanager
async def serving(store: Path, files: engine_pb2.FileSet) -> AsyncIterator[Worker]:
    """A worker from READY on."""
    stdin = engine_pb2.Deployment(name="tiny", files=files, options=OPTIONS).SerializeToString()
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as short:
        sock = Path(short) / "worker.sock"
        argv = ("engine.worker", "--store", str(store), "--socket", str(sock))
        async with (
            running(Path(short), argv, stdin) as process,
            grpc.aio.insecure_channel(f"unix:{sock}") as channel,
        ):
            assert process.said == [
                "READY=1",
                f"X_MAX_CONTEXT_TOKENS={CONTEXT}",
                f"X_RUNS_AS={KERNELS} float32 deterministic",
            ]
            yield Worker(process, channel)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    """One process for all tests that only open sessions: each starts where the engine is idle."""
    store = tmp_path_factory.mktemp("store")
    async with serving(store, into_store(tiny_llama, store)) as shared:
        yield shared


@pytest.mark.asyncio(loop_scope="module")
async def test_sessions_run_together_abort_drain_and_get_only_their_own_rows(worker: Worker) -> None:
    first, second = Session(worker.channel), Session(worker.channel)
    before = (await worker.until_idle()).tokens_generated
    await first.send(submit(1))
    alone = await first.finish(1)
    assert len(alone.token_ids) == 8
    assert alone.end is not None
    assert (alone.end.reason, alone.end.prompt_tokens) == (engine_pb2.END_REASON_LENGTH, 4)

    # Both sessions use the same handles; rows of one never reach the other, whose answers differ.
    await first.send(submit(2, max_tokens=200))
    await second.send(submit(2, (0, 99, 98), max_tokens=60))
    await first.send(submit(1))
    again, other = await first.finish(1), await second.finish(2)
    assert again.token_ids == alone.token_ids  # bitwise the same beside batch mates
    assert len(other.token_ids) == 60
    assert all(len({(row.handle, row.index) for row in frame.rows}) == len(frame.rows) for frame in first.frames)
    steps = [frame.step for frame in first.frames]
    assert steps == sorted(set(steps))

    # Abort ends a request within a step and frees its pages.
    await first.send(engine_pb2.Abort(handle=2))
    aborted = await first.finish(2)
    assert aborted.end is not None
    assert aborted.end.reason == engine_pb2.END_REASON_ABORTED
    assert len(aborted.token_ids) < 200

    # Closing a session aborts what it runs.
    await second.send(submit(3, max_tokens=250))
    await second.read_frame()
    second.call.cancel()
    status = await worker.until_idle()
    assert status.blocks_free + status.blocks_cached == status.blocks_total == 128
    assert status.backend == CPU
    assert status.tokens_generated - before < 8 + 8 + 60 + 200 + 250


def with_everything(handle: int, n: int = 0) -> engine_pb2.Submit:
    """A request that uses every field."""
    command = submit(handle, (0, *range(40, 80)), max_tokens=12)
    command.MergeFrom(
        engine_pb2.Submit(
            temperature=1.3,
            top_k=80,
            min_p=0.001,
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=0.2,
            logit_bias=[engine_pb2.LogitBias(token_id=60, bias=4.0), engine_pb2.LogitBias(token_id=7, bias=-100)],
            min_tokens=4,
            logprobs=2,
            prompt_logprobs=1,
            n=n,
            seed=2**64 - 5,
        )
    )
    return command


@pytest.mark.asyncio(loop_scope="module")
async def test_each_of_n_answers_is_the_one_its_own_seed_gives_alone(worker: Worker) -> None:
    session = Session(worker.channel)
    before = (await worker.until_idle()).tokens_cached
    await session.send(with_everything(1, n=4))
    answers = await session.finish_all(1, 4)
    assert (await worker.status()).tokens_cached - before >= 3 * 32  # the prompt's full pages, computed once
    for index, answer in enumerate(answers):
        command = with_everything(10 + index)
        command.seed = answer_seed(command.seed, index)
        await session.send(command)
        alone = await session.finish(command.handle)
        assert (answer.token_ids, answer.text, answer.logprobs) == (alone.token_ids, alone.text, alone.logprobs)
        assert [one.token_id for one in answer.logprobs] == answer.token_ids
        assert all(len(one.top) == 2 for one in answer.logprobs)
        assert answer.prompt_logprobs == ([] if index else alone.prompt_logprobs)
    assert [one.token_id for one in answers[0].prompt_logprobs] == list(range(40, 80))
    assert len({tuple(answer.token_ids) for answer in answers}) == 4
    assert all(7 not in answer.token_ids for answer in answers)


@pytest.mark.asyncio(loop_scope="module")
async def test_an_abort_at_any_moment_ends_each_of_n_answers_once(worker: Worker) -> None:
    session = Session(worker.channel)
    reasons = set()
    for moment in range(9):
        command = submit(100 + moment, (0, *range(40, 80)), max_tokens=6)
        command.n = 3
        await session.send(command)
        until = len(session.frames) + moment
        while len(session.frames) < until and not all(answer.end for answer in session.all_of(command.handle, 3)):
            await session.read_frame()
        await session.send(engine_pb2.Abort(handle=command.handle))
        reasons |= {answer.end.reason for answer in await session.finish_all(command.handle, 3) if answer.end}
    assert reasons == {engine_pb2.END_REASON_ABORTED, engine_pb2.END_REASON_LENGTH}
    status = await worker.until_idle()
    assert status.blocks_free + status.blocks_cached == status.blocks_total

    running = submit(1, max_tokens=240)
    running.n = 3
    await session.send(running)
    while not all(answer.token_ids for answer in session.all_of(1, 3)):
        await session.read_frame()
    await session.send(engine_pb2.Abort(handle=1))
    ends = [answer.end for answer in await session.finish_all(1, 3)]
    assert [end.reason for end in ends if end] == [engine_pb2.END_REASON_ABORTED] * 3


@pytest.mark.asyncio(loop_scope="module")
async def test_a_refusal_ends_each_of_n_answers_once(worker: Worker) -> None:
    session = Session(worker.channel)
    refused = {2: submit(2, max_tokens=0), 3: submit(3, [VOCABULARY]), 4: submit(4), 5: submit(5)}
    refused[4].logit_bias.append(engine_pb2.LogitBias(token_id=VOCABULARY, bias=1.0))
    refused[5].logprobs = 21
    codes = {2: "INVALID_STOP", 3: "TOKEN_OUT_OF_RANGE", 4: "INVALID_SAMPLING", 5: "INVALID_SAMPLING"}
    for handle, command in refused.items():
        command.n = 3
        await session.send(command)
        ends = [answer.end for answer in await session.finish_all(handle, 3)]
        assert [end.error_reason for end in ends if end] == [codes[handle]] * 3

    await session.send(submit(6, max_tokens=240))
    again = submit(6)
    again.n = 2
    await session.call.write(engine_pb2.SessionRequest(submit=again))
    end = (await session.finish(6)).end
    assert end is not None
    assert end.error_reason == "DUPLICATE_HANDLE"
    many = submit(7)
    many.n = 65
    await session.send(many)
    assert {answer.end.error_reason for answer in await session.finish_all(7, 64) if answer.end} == {
        "INVALID_REQUEST"
    }
    assert not (await worker.until_idle()).running


@pytest.mark.asyncio(loop_scope="module")
async def test_a_bad_submit_ends_its_own_handle_with_a_code_and_nothing_else(worker: Worker) -> None:
    session = Session(worker.channel)
    long_running = submit(100, max_tokens=240)
    await session.send(long_running)
    nan = submit(2)
    nan.temperature = float("nan")
    unstoppable = submit(3)
    unstoppable.stop.append("")
    cases = [
        (submit(1, ()), "EMPTY_PROMPT"),
        (nan, "INVALID_SAMPLING"),
        (unstoppable, "INVALID_STOP"),
        (submit(4, max_tokens=0), "INVALID_STOP"),
        (submit(5, [VOCABULARY]), "TOKEN_OUT_OF_RANGE"),
        (submit(6, [7] * (CONTEXT + 1)), "CONTEXT_OVERFLOW"),
        (engine_pb2.Submit(handle=7, token_ids=[1], max_tokens=1, top_p=1, weight=1), "INVALID_REQUEST"),
    ]
    for command, code in cases:
        end = await session.end_of(command)
        assert (end.reason, end.error_reason) == (engine_pb2.END_REASON_ERROR, code)
    await session.send(submit(8, max_tokens=250))
    await session.call.write(engine_pb2.SessionRequest(submit=submit(8)))
    twice = await session.finish(8)
    assert twice.end is not None
    assert twice.end.error_reason == "DUPLICATE_HANDLE"
    await session.call.write(engine_pb2.SessionRequest())
    await session.send(engine_pb2.Abort(handle=4711))
    assert len((await session.finish(100)).token_ids) == 240


async def test_sigterm_finishes_what_runs_and_refuses_what_is_new(
    tiny_store: tuple[Path, engine_pb2.FileSet],
) -> None:
    async with serving(*tiny_store) as worker:
        await finishes_and_refuses(worker)


async def finishes_and_refuses(worker: Worker) -> None:
    session = Session(worker.channel)
    await session.send(submit(1, max_tokens=200))
    await session.read_frame()
    ending = asyncio.create_task(worker.running.terminate())
    codes = []
    for handle in range(2, 200):
        end = await session.end_of(submit(handle, max_tokens=1))
        codes.append(end.error_reason)
        if codes[-1]:
            break
    assert codes[-1] == "WORKER_DRAINING"
    finished = await session.finish(1)
    assert len(finished.token_ids) == 200
    assert await session.call.read() is grpc.aio.EOF
    assert await session.call.code() is grpc.StatusCode.OK, "in order: this worker has not died over a request"
    assert await ending == 0


@pytest.mark.parametrize(
    ("damage", "code"),
    [("flip", "WEIGHTS_DIGEST_MISMATCH"), ("missing", "FILE_MISSING"), ("kv", "KV_TOO_SMALL")],
)
async def test_a_deployment_that_cannot_run_says_why_and_exits_with_status_3(
    tiny_store: tuple[Path, engine_pb2.FileSet], socket_dir: Path, damage: str, code: str
) -> None:
    store, files = tiny_store
    weights = next(file for file in files.files if file.path == "model.safetensors")
    place = store / "sha256" / weights.sha256[:2] / weights.sha256
    if damage == "flip":
        flip_bit(place)
    elif damage == "missing":
        place.unlink()
    options = engine_pb2.DeploymentOptions(threads=1, kv_blocks=1 if damage == "kv" else 0)
    stdin = engine_pb2.Deployment(name="tiny", files=files, options=options).SerializeToString()
    argv = ("engine.worker", "--store", str(store), "--socket", str(socket_dir / "worker.sock"))
    status, line = await refusal(socket_dir, argv, stdin)
    assert (status, json.loads(line)["code"]) == (3, code)


def beyond_torch(*_: object) -> NoReturn:
    torch.empty(1 << 60, dtype=torch.uint8)
    raise AssertionError("there is so much memory")


def beyond_python(*_: object) -> NoReturn:
    bytearray(1 << 62)
    raise AssertionError("there is so much memory")


@pytest.mark.parametrize("build", [beyond_torch, beyond_python])
def test_memory_that_runs_out_while_loading_is_a_refusal_with_sizes(
    build: Callable[..., NoReturn], tiny_store: tuple[Path, engine_pb2.FileSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, files = tiny_store
    weights = next(file for file in files.files if file.path == "model.safetensors")
    monkeypatch.setattr("engine.build.build_engine", build)
    launch = Launch(engine_pb2.Deployment(name="tiny", files=files, options=OPTIONS), store, Path("unused"))
    with pytest.raises(EngineError, match=f"{weights.size} bytes of weights, KV pages: 128") as refused:
        worker_main._build(launch, [])
    assert refused.value.code == "OUT_OF_MEMORY"


def test_another_error_while_loading_stays_what_it_is(
    tiny_store: tuple[Path, engine_pb2.FileSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object) -> NoReturn:
        raise RuntimeError("shapes differ")

    store, files = tiny_store
    monkeypatch.setattr("engine.build.build_engine", defect)
    with pytest.raises(RuntimeError, match="shapes differ"):
        worker_main._build(Launch(engine_pb2.Deployment(name="tiny", files=files), store, Path("unused")), [])


async def test_a_process_whose_host_is_gone_ends_before_it_reads_or_listens(socket_dir: Path) -> None:
    sock = socket_dir / "worker.sock"
    sock.touch()  # the successor's
    argv = ("engine.worker", "--store", str(socket_dir), "--socket", str(sock), "--parent", str(os.getpid() + 1))
    status, line = await refusal(socket_dir, argv, b"")
    assert (status, line) == (1, "")
    assert sock.exists()


async def test_stdin_without_a_deployment_is_refused(socket_dir: Path) -> None:
    argv = ("engine.worker", "--store", "/nowhere", "--socket", str(socket_dir / "worker.sock"))
    status, line = await refusal(socket_dir, argv, b"\xff")
    assert (status, json.loads(line)["code"]) == (3, "INVALID_DEPLOYMENT")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_seeds_of_answers_are_stable_and_differ() -> None:
    assert answer_seed(7, 0) == 7
    assert answer_seed(7, 1) == int.from_bytes(
        hashlib.sha256(bytes([0] * 7 + [7] + [0, 0, 0, 1])).digest()[:8], "big"
    )
    assert len({answer_seed(seed, index) for seed in range(50) for index in range(8)}) == 400
