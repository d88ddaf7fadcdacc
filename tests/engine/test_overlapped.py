"""The overlapped loop answers as the synchronous one, and takes no page from a step that may still read it."""

import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from engine.errors import EngineLostError
from engine.loop import EngineLoop
from engine.overlapped import OverlappedLoop
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.runner import ModelRunner
from kernels.ops import KvSpec
from kernels.steps import StepLimits
from tests.engine.late import LateOps, late_runner, overlapped
from tests.engine.test_interleavings import OFTEN, SEEN, SIZE, Machine, Watch, drive
from tests.engine.tiny import Answer, engine, request, run, save_llama
from tests.kernels.textbook import held


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> None:
    """Steps fail by the thousand here, each with its traceback."""
    caplog.set_level(logging.CRITICAL, "engine")


def fill(kv: torch.Tensor, pages: list[int]) -> None:
    """With numbers that make nonsense of what is computed from them."""
    kv[:, :, pages] = math.nan


class LateWatch(Watch):
    """Sees, too, that no plan writes pages that a step reads whose result is not known."""

    def __init__(self, model: ModelRunner, blocks: int) -> None:
        self.flying: list[StepPlan] = []
        self.overlapping = 0
        super().__init__(model, blocks)

    def make_runner(self, model: ModelRunner, spec: KvSpec, limits: StepLimits) -> ModelRunner:
        return late_runner(model._model, model._ops, spec, limits)

    @property
    def overlaps(self) -> bool:
        return True

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        tables = {row.handle: row.block_tables[0].blocks for row in plan.rows}
        self.look(tables, set(plan.scrub))
        self.look_at_writes(plan)
        if self.raising % 2:
            self.raising -= 1
            raise MemoryError
        read = self.runner.start(plan)
        for page in plan.scrub:
            self.written_by.pop(page, None)
        self.written_by |= {page: self.requests[handle].scope for handle in tables for page in tables[handle]}
        self.overlapping += bool(self.flying)
        self.flying.append(plan)

        def landed() -> StepResult:
            self.flying.remove(plan)
            result = read()
            if self.raising:
                self.raising -= 1
                raise MemoryError
            if self.breaking & tables.keys():
                raise RuntimeError("boom")
            return result

        return landed

    def execute(self, plan: StepPlan) -> StepResult:
        if self.flying:
            self.wrong.append("a step is executed beside one that was started")
        return super().execute(plan)

    def look_at_writes(self, plan: StepPlan) -> None:
        for row in plan.rows:
            written = set(row.block_tables[0].blocks[row.start // SIZE :]) | set(plan.scrub)
            for other in (other for flying in self.flying for other in flying.rows):
                if other.handle != row.handle and written & set(other.block_tables[0].blocks):
                    self.wrong.append("a page is written that a step reads which has not landed")

    def poison(self, pages: Any) -> None:
        """In its turn, behind all that was started."""
        read = {page for plan in self.flying for row in plan.rows for page in row.block_tables[0].blocks}
        if read & set(pages):
            self.wrong.append("a page is free that a step reads which has not landed")
        ops, kv, gone = cast("LateOps", self.runner._ops), held(self.runner._kv), list(pages)
        ops.stream.start(lambda: fill(kv, gone))


class LateMachine(Machine):
    """The same over a device that computes late."""

    watching = LateWatch
    looping = OverlappedLoop

    def teardown(self) -> None:
        super().teardown()
        watch: Any = self.watch
        self.happened.update(overlapping=watch.overlapping)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EngineLoop:
    """A very small model; its own pages are not used."""
    folder = tmp_path_factory.mktemp("model")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_llama(folder, seed=5, num_hidden_layers=2, **size)
    return engine(folder, block_size=SIZE, deterministic=True)


def test_every_answer_is_the_one_it_is_alone_whatever_the_interleaving(model: EngineLoop) -> None:
    happened = drive(model, examples=20, length=25, kind=LateMachine)
    assert min(happened[name] for name in OFTEN) > 0, happened
    assert happened["overlapping"] > 20, happened


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_answer_is_the_one_it_is_alone_in_many_long_interleavings(model: EngineLoop) -> None:
    happened = drive(model, examples=400, length=60, kind=LateMachine)
    assert min(happened[name] for name in SEEN) > 100, happened


def some_request(handle: int, dice: random.Random) -> Request:
    """One of every kind that ends in every way."""
    prompt = [dice.randrange(2, 250) for _ in range(dice.choice([1, 5, 9, 30]))]
    rest: dict[str, Any] = {
        "ignore_eos": dice.random() < 0.5,
        "seed": handle,
        "min_tokens": dice.choice([0, 0, 3]),
    }
    rest["temperature"] = dice.choice([0.0, 1.0, 3.0])
    rest["top_p"], rest["top_k"] = dice.choice([1.0, 0.8]), dice.choice([0, 0, 20])
    if dice.random() < 0.3:
        rest["strings"] = (dice.choice("aeio"),)
    if dice.random() < 0.3:
        rest["token_ids"] = frozenset(dice.sample(range(2, 250), 40))
    if dice.random() < 0.05:
        rest["logprobs"] = 2
    if dice.random() < 0.05:
        rest["presence_penalty"] = 1.5
    if dice.random() < 0.2:
        rest["logit_bias"] = ((dice.randrange(2, 250), 4.0),)
    return request(handle, prompt, dice.choice([3, 8, 20]), dice.choice("ab"), **rest)


def serve(loop: EngineLoop, seed: int) -> dict[int, Answer]:
    """All answers to requests that come one after another; some are aborted."""
    dice, answers = random.Random(seed), {handle: Answer() for handle in range(30)}
    coming = [some_request(handle, dice) for handle in answers]
    while coming or loop.has_work:
        for _ in range(dice.choice([0, 0, 1, 2])):
            if coming:
                loop.submit(coming.pop(0))
        if dice.random() < 0.03:
            loop.abort(dice.randrange(30))
        for row in loop.step():
            answer = answers[row.handle]
            answer.token_ids.extend(row.token_ids)
            answer.pieces.append(row.text)
            answer.logprobs.extend(row.logprobs)
            if row.end is not None:
                answer.ends.append(row.end)
        loop.scheduler.check()
    assert loop.scheduler.pool.num_owned == 0
    return answers


@pytest.mark.parametrize("seed", range(10))
def test_both_loops_give_the_same_answers_that_end_alike(folder: Path, seed: int) -> None:
    loops = [engine(folder, kv_blocks=24, max_running=6, deterministic=True) for _ in range(2)]
    late = overlapped(loops[1])
    plain, other = (serve(loop, seed) for loop in (loops[0], late))
    for handle, answer in plain.items():
        reasons = {answer.end.reason.value, other[handle].end.reason.value}
        shorter = min(len(answer.token_ids), len(other[handle].token_ids))
        assert answer.token_ids[:shorter] == other[handle].token_ids[:shorter]
        assert answer.logprobs[:shorter] == other[handle].logprobs[:shorter]
        if "aborted" not in reasons:  # when it comes is not the same step
            assert (answer.token_ids, answer.text) == (other[handle].token_ids, other[handle].text)
            same = ("reason", "stop_string", "stop_token_id", "completion_tokens", "prompt_tokens")
            assert [getattr(answer.end, name) == getattr(other[handle].end, name) for name in same] == [True] * 5
    assert step_of(late).named > 5


def step_of(loop: OverlappedLoop) -> Any:
    runner: Any = loop._runner
    return runner._step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


def test_while_a_step_runs_the_tokens_of_the_one_before_are_told(folder: Path) -> None:
    late = overlapped(engine(folder, deterministic=True))
    late.submit(request(0, [40, 41, 42], max_tokens=6, ignore_eos=True))
    for told in range(1, 6):
        (row,) = late.step()
        assert len(row.token_ids) == 1
        assert len(step_of(late).stream.jobs) == 1  # the next one is started, and not computed
        assert step_of(late).named == told
    (row,) = late.step()
    assert row.end is not None
    assert step_of(late).stream.jobs == []  # nothing is computed behind the last token
    assert not late.has_work


def test_who_ends_unforeseen_keeps_its_pages_until_the_step_behind_has_landed(folder: Path) -> None:
    plain = engine(folder, deterministic=True)
    plain.submit(request(0, [40, 41, 42], max_tokens=6, ignore_eos=True))
    third = run(plain)[0].token_ids[2]
    late = overlapped(engine(folder, deterministic=True))
    late.submit(request(0, [40, 41, 42], max_tokens=6, ignore_eos=True, token_ids=frozenset({third})))
    rows = [row for _ in range(3) for row in late.step()]
    assert rows[-1].end is not None
    assert late.scheduler.pool.num_owned == 1
    assert late.has_work
    late.submit(request(0, [50, 51], max_tokens=2, ignore_eos=True))  # its handle is free
    assert late.step() == []
    assert len(run(late)[0].token_ids) == 2


def test_a_step_that_fails_when_it_is_read_is_computed_anew(folder: Path) -> None:
    plain, late = engine(folder, deterministic=True), overlapped(engine(folder, deterministic=True))
    for loop in (plain, late):
        for handle in range(3):
            loop.submit(request(handle, [40 + handle, 41, 42], ignore_eos=True, temperature=1.0, seed=handle))
    fail_once(late, after=3)
    expected, found = run(plain), run(late)
    assert [found[handle].token_ids for handle in range(3)] == [expected[handle].token_ids for handle in range(3)]


def fail_once(loop: OverlappedLoop, after: int) -> None:
    """The result of the step number `after` cannot be read."""
    runner: Any = loop._runner
    start = runner.start

    def failing(plan: StepPlan) -> Callable[[], StepResult]:
        read: Callable[[], StepResult] = start(plan)

        def broken() -> StepResult:
            read()
            raise RuntimeError("boom")

        return broken if plan.step == after else read

    runner.start = failing


def test_a_device_that_is_lost_ends_the_loop_though_steps_are_started_ahead(folder: Path) -> None:
    late = overlapped(engine(folder, deterministic=True, max_running=2))
    for handle in range(30):
        late.submit(request(handle, [40 + handle, 41], ignore_eos=True))
    late.step()
    runner: Any = late._runner

    def lost(*_: object) -> StepResult:
        raise RuntimeError("the device is gone")

    runner.start, runner.execute = lambda plan: lost, lost
    with pytest.raises(EngineLostError):
        run(late)
    assert late.status().waiting > 0  # that was not their fault


def test_steps_of_the_device_backend_take_tokens_that_nobody_has_read(tmp_path: Path) -> None:
    save_llama(tmp_path, num_hidden_layers=1)
    limits = {"max_running": 2, "max_step_tokens": 16, "kv_blocks": 8, "max_context_tokens": 16}
    plain = engine(tmp_path, backend="reference", dtype="float32", **limits)
    other = engine(tmp_path, backend="triton", dtype="float32", **limits)
    late = OverlappedLoop(
        other._runner, other.scheduler, other._vocabulary, other._eos_ids, other.options, other._clock
    )
    for loop in (plain, late):
        loop.submit(request(0, [5, 6, 7], 4, ignore_eos=True, temperature=0.8, seed=4))
        loop.submit(request(1, [8, 9], 3, ignore_eos=True))
    step, named = step_of(late), []
    sampled = step.sampled

    def counting(rows: Any, *rest: Any, **others: Any) -> Any:
        named.extend(token for token in rows.token_ids if token < 0)
        return sampled(rows, *rest, **others)

    step.sampled = counting
    expected, found = run(plain), run(late)
    assert [found[handle].token_ids for handle in range(2)] == [expected[handle].token_ids for handle in range(2)]
    assert len(named) == 3 + 2  # all but the first tokens
