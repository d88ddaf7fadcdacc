"""Whatever happens in whatever order, a request gets the answer it gets alone, from pages of its own scope only.

A Hypothesis state machine drives a real model with real KV pages through submissions, continued conversations,
groups of answers to one prompt (of which some belong to another owner), prompts of which a vector is wanted,
aborts, steps, steps that run out of memory, and steps that fail for one request or for all, in a pool so small
that prefix hits, evictions and preemptions happen by themselves. Every page that nobody keeps is filled with NaN.
"""

import logging
import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.block_pool import BlockPool
from engine.detokenizer import Vocabulary
from engine.loop import EngineLoop
from engine.plan import StepPlan, StepResult
from engine.request import EndReason, Request, Task
from engine.runner import ModelRunner
from engine.scheduler import Limits, Scheduler
from kernels.ops import KvSpec
from kernels.steps import StepLimits
from tests.engine.tiny import Answer, engine, request, save_llama
from tests.kernels.textbook import held

BLOCKS, SIZE, RUNNING, STEP, LONGEST = 12, 4, 5, 24, 16
STREAMS = [[40 + (i * step) % 200 for i in range(40)] for step in (7, 11)]
OWNERS = [("a", b"salt"), ("b", b"salt"), ("a", b"other"), ("b", b"")]
OFTEN = ("answers", "vectors", "hits")  # in any few interleavings
SEEN = (*OFTEN, "preemptions", "recomputed", "lost_steps")  # in many
Owner = tuple[str, bytes]
Group = tuple[str, bytes | int]


class Watch:
    """A runner over pages of its own, full of NaN at first; it sees what each plan reads, and what it scrubs."""

    def __init__(self, model: ModelRunner, blocks: int) -> None:
        spec = model._kv.spec._replace(num_blocks=blocks)
        limits = StepLimits(STEP, RUNNING, BLOCKS * SIZE)
        self.runner = self.make_runner(model, spec, limits)
        self.requests: dict[int, Request] = {}
        self.written_by: dict[int, str] = {}  # the scope whose numbers a page holds
        self.raising = 0
        self.breaking: set[int] = set()  # handles whose steps raise
        self.wrong: list[str] = []  # the loop takes whatever a runner raises for a fault of a request
        self.poison(range(blocks))

    def make_runner(self, model: ModelRunner, spec: KvSpec, limits: StepLimits) -> ModelRunner:
        return ModelRunner(model._model, model._ops, spec, limits)

    def execute(self, plan: StepPlan) -> StepResult:
        tables = {row.handle: row.block_tables[0].blocks for row in plan.rows}
        self.look(tables, set(plan.scrub))
        if self.raising:
            self.raising -= 1
            raise MemoryError
        if self.breaking & tables.keys():
            raise RuntimeError("boom")
        result = self.runner.execute(plan)
        for page in plan.scrub:
            self.written_by.pop(page, None)
        self.written_by |= {page: self.requests[handle].scope for handle in tables for page in tables[handle]}
        return result

    def look(self, tables: dict[int, tuple[int, ...]], scrubbed: set[int]) -> None:
        """Note each page that is in tables of two owners, or comes to a scope as another has left it."""
        owners: dict[int, Group] = {}
        for handle, table in tables.items():
            one = self.requests[handle]
            for page in table:
                if owners.setdefault(page, self.group_of(one)) != self.group_of(one):
                    self.wrong.append(f"page {page} is in tables of two owners")
                if self.written_by.get(page, one.scope) != one.scope and page not in scrubbed:
                    self.wrong.append(f"page {page} comes to another scope as it is")

    def group_of(self, one: Request) -> Group:
        """Who may share its pages: its scope and salt; without a salt, those alone that follow the same one."""
        if one.salt:
            return one.scope, one.salt
        leader = None if one.follows is None else self.requests[one.follows]
        same = leader is not None and (leader.scope, leader.salt) == (one.scope, one.salt)
        return one.scope, leader.handle if leader is not None and same else one.handle

    def poison(self, pages: Any) -> None:
        """Whoever reads these from now on computes nonsense."""
        held(self.runner._kv)[:, :, list(pages)] = math.nan


def loop_over(watch: Watch, model: EngineLoop, blocks: int, kind: type[EngineLoop] = EngineLoop) -> EngineLoop:
    pool = BlockPool(blocks, SIZE)
    limits = Limits(STEP, RUNNING, model.max_context_tokens, whole_blocks=True)
    vocabulary: Vocabulary = model._vocabulary
    tasks = (Task.GENERATE, Task.EMBED)
    return kind(watch, Scheduler(pool, limits, "digest"), vocabulary, (), model.options, tasks=tasks)


class Live(NamedTuple):
    """A request that has not ended."""

    request: Request
    answer: Answer


class Machine(RuleBasedStateMachine):
    """All requests of one small deployment."""

    model: EngineLoop
    alone: dict[tuple[tuple[int, ...], float, Task], list[float]]
    happened: Counter[str]
    watching: type[Watch] = Watch
    looping: type[EngineLoop] = EngineLoop

    def __init__(self) -> None:
        super().__init__()
        runner: Any = self.model._runner
        self.watch = self.watching(runner, BLOCKS)
        self.loop = loop_over(self.watch, self.model, BLOCKS, self.looping)
        self.live: dict[int, Live] = {}
        self.computed: list[tuple[Group, list[int]]] = []  # whose tokens have been in pages
        self.turns: list[list[int]] = []
        self.next = 0

    @rule(
        stream=st.sampled_from(STREAMS),
        shared=st.integers(0, 22),
        own=st.lists(st.integers(2, 250), min_size=1, max_size=3),
        answer=st.integers(1, LONGEST),
        owner=st.sampled_from(OWNERS),
        penalty=st.sampled_from([1.0, 1.0, 1.3]),
        others=st.lists(st.sampled_from([None, None, None, *OWNERS]), max_size=2),
        judged=st.sampled_from([None, None, None, 1]),
    )
    def submit(
        self,
        stream: list[int],
        shared: int,
        own: list[int],
        owner: Owner,
        others: list[Owner | None],
        answer: int,
        penalty: float,
        judged: int | None,
    ) -> None:
        first = self.next
        for i, its_owner in enumerate([owner, *(other or owner for other in others)]):
            rest = {"repetition_penalty": penalty, "prompt_logprobs": None if i else judged}
            self.add([*stream[:shared], *own], max(1, answer - i), its_owner, follows=first if i else None, **rest)

    @rule(
        stream=st.sampled_from(STREAMS),
        shared=st.integers(0, 34),
        own=st.lists(st.integers(2, 250), min_size=1, max_size=3),
        owner=st.sampled_from(OWNERS),
    )
    def embed(self, stream: list[int], shared: int, own: list[int], owner: Owner) -> None:
        self.add([*stream[:shared], *own], 1, owner, task=Task.EMBED)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), owner=st.sampled_from(OWNERS), answer=st.integers(1, 6))
    def continue_a_conversation(self, data: st.DataObject, owner: Owner, answer: int) -> None:
        self.add([*data.draw(st.sampled_from(self.turns)), 9], answer, owner)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.live)))
        self.loop.abort(handle)
        self.step()
        assert handle not in self.live

    @precondition(lambda self: self.live)
    @rule(times=st.integers(1, 4))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.step()

    @precondition(lambda self: self.loop.status().running > 1)
    @rule(times=st.integers(1, 3))
    def step_without_memory(self, times: int) -> None:
        self.watch.raising = times
        self.step()
        self.watch.raising = 0

    @precondition(lambda self: self.loop.status().running > 1)
    @rule(data=st.data(), everybody=st.booleans())
    def step_that_fails(self, data: st.DataObject, everybody: bool) -> None:
        live = set(self.live)
        self.watch.breaking = live if everybody else {data.draw(st.sampled_from(sorted(live)))}
        self.step()
        self.happened.update(lost_steps=everybody)
        self.watch.breaking = set()

    def add(self, prompt: list[int], answer: int, owner: Owner, **rest: Any) -> None:
        one = request(self.next, prompt, answer, owner[0], salt=owner[1], ignore_eos=True, **rest)
        self.live[self.next] = Live(one, Answer())
        self.watch.requests[self.next] = one
        self.loop.submit(one)
        self.next += 1

    def step(self) -> None:
        for row in self.loop.step():
            answer = self.live[row.handle].answer
            answer.token_ids.extend(row.token_ids)
            answer.prompt_logprobs.extend(row.prompt_logprobs)
            answer.values.extend(row.values)
            if row.end is not None:
                answer.ends.append(row.end)
                self.finish(*self.live.pop(row.handle))
        assert self.watch.wrong == []
        self.watch.poison(self.loop.scheduler.pool._free)

    def finish(self, one: Request, answer: Answer) -> None:
        end = answer.end
        broken = "ENGINE_STEP_FAILED" if one.handle in self.watch.breaking else "OUT_OF_MEMORY"
        assert end.reason is not EndReason.ERROR or end.error_code == broken
        if one.task is Task.EMBED:
            assert answer.values == (self.expected(one) if end.reason is EndReason.STOP else [])
            assert answer.token_ids == []
        else:
            assert answer.token_ids == self.expected(one)[: len(answer.token_ids)]
        if end.reason is EndReason.LENGTH:
            assert len(answer.token_ids) == one.limit
            judged = 0 if one.prompt_logprobs is None else len(one.prompt) - 1
            assert [report.token_id for report in answer.prompt_logprobs] == list(one.prompt[1 : 1 + judged])
            if one.num_tokens < BLOCKS * SIZE - 6:
                self.turns.append(list(one.tokens))
        self.may_have_hit(one, end.cached_prompt_tokens)
        self.computed.append((self.watch.group_of(one), list(one.tokens)))
        self.happened.update(
            hits=end.cached_prompt_tokens > 0,
            preemptions=end.preemptions,
            recomputed=end.recomputed_tokens > 0,
            out_of_memory=end.error_code == "OUT_OF_MEMORY",
            answers=end.reason is EndReason.LENGTH,
            vectors=one.task is Task.EMBED and end.reason is EndReason.STOP,
        )

    def may_have_hit(self, one: Request, cached: int) -> None:
        """What was not computed for `one` had been computed for its own scope and salt, in whole pages."""
        assert cached <= len(one.prompt) - 1
        assert cached % SIZE == 0
        running = [(self.watch.group_of(live.request), live.request.tokens) for live in self.live.values()]
        own = [tokens for group, tokens in self.computed + running if group == self.watch.group_of(one)]
        assert cached == 0 or any(tokens[:cached] == list(one.prompt[:cached]) for tokens in own)

    def expected(self, one: Request) -> list[float]:
        """The answer, or the vector, in an engine that has never done anything else."""
        key = tuple(one.prompt), one.sampling.repetition_penalty, one.task
        if key not in self.alone:
            runner: Any = self.model._runner
            watch = Watch(runner, 2 * BLOCKS)
            loop = loop_over(watch, self.model, 2 * BLOCKS)
            rest = {"repetition_penalty": key[1], "ignore_eos": True, "task": one.task}
            watch.requests[0] = request(0, key[0], LONGEST, **rest)
            loop.submit(watch.requests[0])
            self.alone[key] = []
            while loop.has_work:
                self.alone[key].extend(number for row in loop.step() for number in (*row.token_ids, *row.values))
        return self.alone[key]

    @invariant()
    def pages_are_conserved(self) -> None:
        scheduler = self.loop.scheduler
        scheduler.check()
        assert scheduler.pool.num_free + scheduler.pool.num_cached + scheduler.pool.num_owned == BLOCKS

    def teardown(self) -> None:
        for _ in range(100 + sum(20 * live.request.limit for live in self.live.values())):
            if not self.live:
                break
            self.step()
        assert not self.live, "requests do not get on"
        while self.loop.has_work:
            self.step()
        assert self.loop.scheduler.pool.num_owned == 0


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> None:
    """Steps fail by the thousand here, each with its traceback."""
    caplog.set_level(logging.CRITICAL, "engine.loop")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EngineLoop:
    """A very small model; its own pages are not used."""
    folder = tmp_path_factory.mktemp("model")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_llama(folder, seed=5, num_hidden_layers=2, **size)
    return engine(folder, block_size=SIZE, deterministic=True)


def drive(model: EngineLoop, examples: int, length: int, kind: type[Machine] = Machine) -> Counter[str]:
    """Run the machine; what happened in all examples."""
    counter: Counter[str] = Counter()
    fields = {"model": model, "alone": {}, "happened": counter}
    machine = type("MachineOverModel", (kind,), fields)
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=length,
            deadline=None,
            print_blob=True,
            suppress_health_check=checks,
        ),
    )
    return counter


def test_every_answer_is_the_one_it_is_alone_whatever_the_interleaving(model: EngineLoop) -> None:
    happened = drive(model, examples=30, length=25)
    assert min(happened[name] for name in OFTEN) > 0, happened


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_answer_is_the_one_it_is_alone_in_many_long_interleavings(model: EngineLoop) -> None:
    happened = drive(model, examples=400, length=60)
    assert min(happened[name] for name in SEEN) > 100, happened
