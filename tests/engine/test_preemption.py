"""Preemption, for want of pages or of memory: whoever gives up its pages ends as if nothing had been."""

import math
from pathlib import Path
from typing import Any

import pytest

from engine.errors import is_out_of_memory
from engine.loop import EngineLoop
from engine.plan import SamplerSetup, StepPlan, StepResult
from engine.request import EndReason, Request
from tests.engine.tiny import Answer, engine, request, run, save_llama
from tests.kernels.textbook import held

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_llama(folder, **size)
    return folder


def tiny_pool(folder: Path, blocks: int = 12, **options: Any) -> EngineLoop:
    return engine(folder, **({"deterministic": True, "kv_blocks": blocks, "block_size": 4} | options))


def long_requests(count: int, **rest: Any) -> list[Request]:
    """Requests that begin with two pages of four tokens each, and need all twelve of them at their end."""
    rest = {"ignore_eos": True, "temperature": 1.0} | rest
    return [request(i, [7 + i, *PROMPT[:4]], 44, seed=i, **rest) for i in range(count)]


def answers(loop: EngineLoop, requests: list[Request]) -> dict[int, Answer]:
    for one in requests:
        loop.submit(one)
    return run(loop)


def until_preempted(loop: EngineLoop, requests: list[Request]) -> Request:
    """Step until one of `requests` gives up its pages."""
    while loop.has_work:
        loop.step()
        for one in requests:
            if one.preemptions:
                return one
    raise AssertionError("nobody was preempted")


@pytest.mark.parametrize("salt", [b"", b"salt"])
def test_requests_that_each_need_the_whole_pool_all_finish_with_few_preemptions(folder: Path, salt: bytes) -> None:
    count = 8
    roomy = answers(tiny_pool(folder, 200), long_requests(count, salt=salt))
    loop = tiny_pool(folder)
    tight = answers(loop, long_requests(count, salt=salt))
    assert {h: a.token_ids for h, a in tight.items()} == {h: a.token_ids for h, a in roomy.items()}
    assert all(a.end.reason is EndReason.LENGTH for a in tight.values())
    ends = [a.end for a in tight.values()]
    assert 0 < loop.status().preemptions == sum(end.preemptions for end in ends)
    assert max(end.preemptions for end in ends) <= 4  # each doubles the room it waits for: 1, 2, 4, then all of it
    assert loop.status().tokens_recomputed == sum(end.recomputed_tokens for end in ends) > 0
    assert sum(end.prompt_tokens for end in ends) == count * 5
    if not salt:
        assert loop.status().tokens_prefilled == count * 5


def test_penalties_and_reports_go_on_where_they_were(folder: Path) -> None:
    rest = {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "logprobs": 2, "prompt_logprobs": 1}
    roomy = answers(tiny_pool(folder, 200), long_requests(4, salt=b"salt", **rest))
    loop = tiny_pool(folder)
    tight = answers(loop, long_requests(4, salt=b"salt", **rest))
    assert loop.status().preemptions > 0
    for handle, answer in roomy.items():
        assert tight[handle].token_ids == answer.token_ids
        assert tight[handle].logprobs == answer.logprobs
        assert tight[handle].prompt_logprobs == answer.prompt_logprobs


def test_the_oldest_is_never_preempted_and_the_newest_of_its_scope_goes_first(folder: Path) -> None:
    loop = tiny_pool(folder)
    requests = long_requests(3)
    for one in requests:
        loop.submit(one)
    until_preempted(loop, requests)
    assert [one.preemptions for one in requests] == [0, 0, 1]
    assert run(loop)[0].end.preemptions == 0


def test_the_scope_that_has_had_most_is_preempted_first(folder: Path) -> None:
    loop = tiny_pool(folder, 26)
    requests = [
        request(i, [i + 2] * 8, 40, scope, ignore_eos=True, weight=weight)
        for i, (scope, weight) in enumerate([("modest", 9), ("greedy", 1), ("modest", 9)])
    ]
    ends = {handle: answer.end for handle, answer in answers(loop, requests).items()}
    assert ends[1].preemptions > 0
    assert (ends[0].preemptions, ends[2].preemptions) == (0, 0)


def test_the_oldest_is_not_preempted_even_when_its_scope_has_had_most(folder: Path) -> None:
    loop = tiny_pool(folder, 26)
    requests = [
        request(i, [i + 2] * 8, 40, scope, ignore_eos=True, weight=weight)
        for i, (scope, weight) in enumerate([("greedy", 1), ("modest", 9), ("modest", 9)])
    ]
    ends = {handle: answer.end for handle, answer in answers(loop, requests).items()}
    assert ends[0].preemptions == 0 < ends[2].preemptions


def test_who_was_preempted_is_charged_its_tokens_once(folder: Path) -> None:
    loop = tiny_pool(folder)
    answers(loop, long_requests(6, salt=b""))
    assert loop.status().preemptions > 0
    assert loop.scheduler._waiting._served["a"] == 6 * (5 + 44)


def test_a_preempted_request_can_be_aborted(folder: Path) -> None:
    loop = tiny_pool(folder)
    requests = long_requests(4)
    for one in requests:
        loop.submit(one)
    victim = until_preempted(loop, requests)
    loop.abort(victim.handle)
    end = run(loop)[victim.handle].end
    assert end.reason is EndReason.ABORTED
    assert (end.prompt_tokens, end.preemptions) == (5, 1)


def test_end_and_stop_tokens_are_banned_up_to_the_shortest_answer(folder: Path) -> None:
    loop = tiny_pool(folder, 200)
    setups: list[SamplerSetup] = []
    runner: Any = loop._runner
    execute = runner.execute

    def recording(plan: StepPlan) -> StepResult:
        setups.extend(plan.samplers)
        result: StepResult = execute(plan)
        return result

    runner.execute = recording
    stop = {"min_tokens": 3, "token_ids": frozenset({9})}
    loop.submit(request(0, PROMPT, **stop))
    loop.submit(request(1, PROMPT, ignore_eos=True, **stop))
    loop.submit(request(2, PROMPT))
    run(loop)
    assert [(setup.banned, setup.banned_until) for setup in setups[:2]] == [((1, 9), 23), ((9,), 23)]
    assert setups[2].banned == ()


@pytest.mark.parametrize("salt", [b"", b"salt"])
def test_answers_to_one_prompt_compute_it_once(folder: Path, salt: bytes) -> None:
    loop = tiny_pool(folder, 200)
    group = [request(i, PROMPT, temperature=1.0, seed=i, salt=salt, follows=0 if i else None) for i in range(4)]
    for one in group:
        loop.submit(one)
    loop.step()
    assert (loop.status().running, loop.status().waiting) == (1, 3)
    ends = [answer.end for _, answer in sorted(run(loop).items())]
    assert [end.cached_prompt_tokens for end in ends] == [0, 16, 16, 16]
    assert loop.status().tokens_prefilled == 20 + 3 * 4
    assert loop.status().blocks_cached == 0 or salt


def test_who_waits_for_its_sibling_is_in_nobodys_way(folder: Path) -> None:
    loop = tiny_pool(folder, 200, max_step_tokens=48, max_running=4)
    for one in (
        request(0, PROMPT * 2, salt=b"s"),
        request(1, PROMPT * 2, salt=b"s", follows=0),
        request(2, [5, 6], salt=b"s"),
        request(3, [5, 6], scope="b"),
    ):
        loop.submit(one)
    assert {row.handle for row in loop.step()} == {0, 2, 3}
    assert {row.handle for row in loop.step()} == {0, 1, 2, 3}


@pytest.mark.parametrize("early", [True, False])
def test_when_the_first_of_a_group_is_gone_the_next_takes_its_place(folder: Path, early: bool) -> None:
    loop = tiny_pool(folder, 200, max_step_tokens=8, max_running=4)
    for i in range(4):
        loop.submit(request(i, PROMPT, ignore_eos=True, follows=0 if i else None))
    if not early:
        loop.step()
    loop.abort(0)
    loop.abort(2)
    ends = {handle: answer.end for handle, answer in run(loop).items()}
    assert [ends[handle].reason for handle in (1, 3)] == [EndReason.LENGTH] * 2
    assert ends[3].cached_prompt_tokens == 16


def test_when_the_numbers_of_the_first_of_a_group_fail_the_next_takes_its_place(folder: Path) -> None:
    loop = tiny_pool(folder, 200, max_step_tokens=12, max_running=4)
    group = [request(i, PROMPT, ignore_eos=True, follows=0 if i else None) for i in range(4)]
    for one in group:
        loop.submit(one)
    loop.step()
    runner: Any = loop._runner
    held(runner._kv)[:, :, group[0].blocks[0]] = math.nan  # read by the prompt's last piece
    loop.step()
    assert group[0].handle not in loop._requests
    assert loop.step() == []
    assert (loop.status().running, loop.status().waiting) == (1, 2)
    ends = {handle: answer.end for handle, answer in run(loop).items()}
    assert [ends[handle].cached_prompt_tokens for handle in (1, 2, 3)] == [0, 16, 16]
    assert {end.reason for end in ends.values()} == {EndReason.LENGTH}


def test_who_inherits_a_group_keeps_those_that_followed_it_before(folder: Path) -> None:
    loop = tiny_pool(folder, 200, max_step_tokens=8, max_running=4)
    for handle, first in ((0, None), (1, 0), (2, 0), (3, 1)):
        loop.submit(request(handle, PROMPT, ignore_eos=True, follows=first))
    loop.abort(0)
    loop.step()
    assert (loop.status().running, loop.status().waiting) == (1, 2)
    ends = {handle: answer.end for handle, answer in run(loop).items()}
    assert [ends[handle].cached_prompt_tokens for handle in (1, 2, 3)] == [0, 16, 16]


@pytest.mark.parametrize("other", [{"scope": "b"}, {"salt": b"other"}], ids=["scope", "salt"])
def test_nobody_follows_into_another_scope_or_salt(folder: Path, other: dict[str, Any]) -> None:
    loop = tiny_pool(folder, 200)
    loop.submit(request(0, PROMPT, salt=b"salt"))
    loop.submit(request(1, PROMPT, follows=0, **({"salt": b"salt"} | other)))
    assert run(loop)[1].end.cached_prompt_tokens == 0


class Little:
    """A runner with memory for so many rows and tokens in a step; for `never`, with none."""

    def __init__(self, runner: Any, rows: int, tokens: int, error: Exception, never: int | None = None) -> None:
        self.runner, self.rows, self.tokens, self.error, self.never = runner, rows, tokens, error, never
        self.failed = self.done = 0

    def execute(self, plan: StepPlan) -> StepResult:
        tokens = sum(len(row.token_ids) for row in plan.rows)
        too_much = len(plan.rows) > self.rows or tokens > self.tokens
        if too_much or any(row.handle == self.never for row in plan.rows):
            self.failed += 1
            raise self.error
        self.done += 1
        result: StepResult = self.runner.execute(plan)
        return result


def device_error() -> Exception:
    """What torch raises on a device: known by its name, because the loop does not import torch."""
    kind: type[Exception] = type("OutOfMemoryError", (RuntimeError,), {})
    return kind("CUDA out of memory")


ERRORS = [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: no"), device_error()]


@pytest.mark.parametrize("error", ERRORS, ids=["python", "torch on the CPU", "torch on a device"])
def test_a_step_that_runs_out_of_memory_goes_on_with_fewer_requests(folder: Path, error: Exception) -> None:
    loops = [tiny_pool(folder, 200) for _ in range(2)]
    little: Any = Little(loops[1]._runner, rows=3, tokens=40, error=error)
    loops[1]._runner = little
    plenty, scarce = (answers(loop, long_requests(8)) for loop in loops)
    assert {h: a.token_ids for h, a in scarce.items()} == {h: a.token_ids for h, a in plenty.items()}
    assert scarce[0].end.preemptions == 0
    assert loops[1].status().preemptions > 0
    assert little.failed < little.done / 4  # it learns


def test_a_prompt_too_large_for_a_step_is_computed_in_smaller_pieces(folder: Path) -> None:
    loop = tiny_pool(folder, 200)
    whole = answers(loop, [request(0, PROMPT * 5, ignore_eos=True)])
    little: Any = Little(loop._runner, rows=1, tokens=20, error=MemoryError())
    loop._runner = little
    pieces = answers(loop, [request(0, PROMPT * 5, ignore_eos=True)])
    assert pieces[0].token_ids == whole[0].token_ids
    assert little.failed > 0


@pytest.mark.parametrize("culprit", [0, 2])
def test_only_a_request_that_alone_runs_out_of_memory_ends_with_it(folder: Path, culprit: int) -> None:
    loop = tiny_pool(folder, 200)
    plenty = answers(loop, long_requests(4))
    loop._runner = Little(loop._runner, rows=9, tokens=999, error=MemoryError(), never=culprit)
    scarce = answers(loop, long_requests(4))
    end = scarce.pop(culprit).end
    assert (end.reason, end.error_code) == (EndReason.ERROR, "OUT_OF_MEMORY")
    assert {h: a.token_ids for h, a in scarce.items()} == {h: plenty[h].token_ids for h in scarce}


def test_steps_grow_again_after_memory_was_short(folder: Path) -> None:
    loop = tiny_pool(folder, 200)
    little: Any = Little(loop._runner, rows=1, tokens=8, error=MemoryError())
    loop._runner = little
    requests = [request(i, [i + 2] * 6, 120, ignore_eos=True) for i in range(3)]
    for one in requests:
        loop.submit(one)
    loop.step()
    little.rows = little.tokens = 999
    loop.step()
    assert loop.status().running < 3
    while loop.has_work and loop.status().running < 3:
        loop.step()
    assert loop.status().running == 3
    run(loop)


@pytest.mark.parametrize(("error", "is_one"), [(error, True) for error in ERRORS] + [(ValueError("x"), False)])
def test_memory_that_ran_out_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one
