"""The loop: how requests end, what an abort frees, and that a bad request kills only itself."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError, EngineLostError
from engine.loop import LOST_STEPS, EngineLoop
from engine.plan import StepPlan, StepResult
from engine.request import EndReason
from tests.engine.tiny import engine, request, run, save_llama
from tests.kernels.textbook import held

PROMPT = list(range(40, 65))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


@pytest.fixture
def loop(folder: Path) -> EngineLoop:
    return engine(folder, deterministic=True)


def test_an_answer_ends_at_max_tokens_with_its_counts(loop: EngineLoop) -> None:
    loop.submit(request(7, PROMPT, max_tokens=5, ignore_eos=True))
    answer = run(loop)[7]
    assert len(answer.token_ids) == 5
    assert answer.end.reason is EndReason.LENGTH
    assert (answer.end.prompt_tokens, answer.end.completion_tokens) == (25, 5)
    status = loop.status()
    assert (status.steps, status.tokens_prefilled, status.tokens_generated) == (5, 25, 5)
    assert min(answer.end.queue_ns, answer.end.prefill_ns, answer.end.decode_ns) >= 0 < answer.end.decode_ns


def test_an_answer_ends_where_the_context_does(folder: Path) -> None:
    loop = engine(folder, max_context_tokens=30)
    loop.submit(request(1, PROMPT, max_tokens=100, ignore_eos=True))
    answer = run(loop)[1]
    assert (len(answer.token_ids), answer.end.reason) == (5, EndReason.LENGTH)


def test_a_stop_token_ends_the_answer_and_its_text_is_kept_only_on_request(loop: EngineLoop) -> None:
    free = ask(loop, max_tokens=12)
    token = free.token_ids[5]
    cut = ask(loop, max_tokens=12, token_ids=frozenset({token}))
    kept = ask(loop, max_tokens=12, token_ids=frozenset({token}), include_stop=True)
    end = free.token_ids.index(token) + 1
    assert cut.token_ids == kept.token_ids == free.token_ids[:end]
    assert cut.end.stop_token_id == token
    assert cut.end.reason is EndReason.STOP
    assert free.text.startswith(cut.text.rstrip("\ufffd"))
    assert len(kept.text) > len(cut.text)


def test_a_stop_string_ends_the_answer_before_it(loop: EngineLoop) -> None:
    free = ask(loop, max_tokens=30)
    stop = free.text[9:12]
    cut = ask(loop, max_tokens=30, strings=("never there", stop))
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.end.reason, cut.end.stop_string) == (EndReason.STOP, stop)
    assert len(cut.token_ids) < 30
    assert ask(loop, max_tokens=30, strings=(stop,), include_stop=True).text == cut.text + stop


def test_the_models_own_end_token_ends_the_answer_unless_ignored(folder: Path, loop: EngineLoop) -> None:
    token = ask(loop, max_tokens=4).token_ids[2]
    loop._eos_ids = frozenset({token})
    ended = ask(loop, max_tokens=4, ignore_eos=False)
    assert ended.token_ids[-1] == token
    assert ended.end.stop_token_id == token
    assert len(ask(loop, max_tokens=4, ignore_eos=True).token_ids) == 4


def ask(loop: EngineLoop, **rest: Any) -> Any:
    loop.submit(request(0, PROMPT, **({"ignore_eos": True} | rest)))
    return run(loop)[0]


def test_an_abort_frees_the_pages_at_once_and_ends_the_request_in_the_next_step(loop: EngineLoop) -> None:
    for handle in range(3):
        loop.submit(request(handle, PROMPT, max_tokens=50, ignore_eos=True))
    loop.step()
    loop.step()
    owned = loop.status().blocks_total - loop.status().blocks_free
    loop.abort(1)
    loop.abort(1)
    loop.abort(99)
    assert loop.status().blocks_total - loop.status().blocks_free == owned * 2 // 3
    rows = {row.handle: row for row in loop.step()}
    assert rows[1].end is not None
    assert rows[1].end.reason is EndReason.ABORTED
    assert rows[1].end.completion_tokens == 2
    assert rows[0].end is None
    answers = run(loop)
    assert set(answers) == {0, 2}


def test_a_waiting_request_can_be_aborted(folder: Path) -> None:
    loop = engine(folder, max_running=1)
    loop.submit(request(0, PROMPT, ignore_eos=True))
    loop.submit(request(1, PROMPT))
    loop.step()
    loop.abort(1)
    answers = run(loop)
    assert answers[1].end.reason is EndReason.ABORTED
    assert answers[1].end.prompt_tokens == 0
    assert answers[0].end.reason is EndReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "code"),
    [
        ([5, 300], 4, "TOKEN_OUT_OF_RANGE"),
        ([-1], 4, "TOKEN_OUT_OF_RANGE"),
        ([5] * 256, 4, "CONTEXT_OVERFLOW"),
        ([5] * 60, 100, "KV_TOO_SMALL"),
    ],
)
def test_what_can_never_run_is_refused_by_its_code(
    folder: Path, prompt: list[int], max_tokens: int, code: str
) -> None:
    loop = engine(folder, kv_blocks=16)
    with pytest.raises(EngineError) as error:
        loop.submit(request(0, prompt, max_tokens))
    assert error.value.code == code
    assert not loop.has_work


def test_two_requests_cannot_share_a_handle(loop: EngineLoop) -> None:
    loop.submit(request(0, PROMPT))
    with pytest.raises(EngineError, match="DUPLICATE_HANDLE"):
        loop.submit(request(0, PROMPT))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(EngineError, match="EMPTY_PROMPT"):
        request(0, [])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": math.nan},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_sampling_parameters_outside_their_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="INVALID_SAMPLING"):
        request(0, PROMPT, **bad)


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"strings": ("ok", "")}], ids=str)
def test_stop_criteria_that_mean_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="INVALID_STOP"):
        request(0, PROMPT, **bad)


class Saboteur:
    """A runner whose steps raise whenever the request `handle` is in them."""

    def __init__(self, runner: Any, handle: int) -> None:
        self.runner, self.handle = runner, handle

    def execute(self, plan: StepPlan) -> StepResult:
        result: StepResult = self.runner.execute(plan)  # what it wrote before it failed stays
        if any(row.handle == self.handle for row in plan.rows):
            raise RuntimeError("boom")
        return result


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_request_that_breaks_its_step_ends_alone(folder: Path, culprit: int) -> None:
    loops = [engine(folder, deterministic=True) for _ in range(2)]
    loops[1]._runner = Saboteur(loops[1]._runner, culprit)
    for loop in loops:
        for handle in range(3):
            loop.submit(request(handle, PROMPT[handle:], temperature=1.0, seed=handle, ignore_eos=True))
    healthy, harmed = (run(loop) for loop in loops)
    end = harmed[culprit].end
    assert (end.reason, end.error_code) == (EndReason.ERROR, "ENGINE_STEP_FAILED")
    assert "boom" not in end.error_message
    for handle in {0, 1, 2} - {culprit}:
        assert harmed[handle].token_ids == healthy[handle].token_ids


class Faulty:
    """A runner whose steps raise what `fault` finds in them."""

    def __init__(self, loop: EngineLoop, fault: Callable[[StepPlan], Exception | None]) -> None:
        self.runner, self.fault = loop._runner, fault
        loop._runner = self

    def execute(self, plan: StepPlan) -> StepResult:
        error = self.fault(plan)
        if error is not None:
            raise error
        return self.runner.execute(plan)


def dead(plan: StepPlan) -> Exception:
    return RuntimeError("the device is gone")


def fail_alone(loop: EngineLoop, prompts: Iterable[Sequence[int]]) -> None:
    for handle, prompt in enumerate(prompts):
        loop.submit(request(handle, prompt))
        assert run(loop)[handle].end.error_code == "ENGINE_STEP_FAILED"


def test_when_every_step_fails_whoever_is_in_it_the_engine_gives_up(loop: EngineLoop) -> None:
    Faulty(loop, dead)
    fail_alone(loop, [PROMPT[i:] for i in range(LOST_STEPS - 1)])
    loop.submit(request(99, PROMPT))
    with pytest.raises(EngineLostError):
        loop.step()


def test_one_request_that_fails_again_and_again_is_not_the_engines_end(loop: EngineLoop) -> None:
    Faulty(loop, dead)
    fail_alone(loop, [PROMPT] * (2 * LOST_STEPS))


def test_a_step_that_succeeds_for_anybody_shows_that_the_engine_lives(loop: EngineLoop) -> None:
    faulty = Faulty(loop, dead)
    for first in range(3):
        faulty.fault = dead
        fail_alone(loop, [PROMPT[first + i :] for i in range(LOST_STEPS - 1)])
        faulty.fault = lambda plan: None
        assert ask(loop, max_tokens=1).end.reason is EndReason.LENGTH


def test_memory_that_is_short_for_everybody_is_not_the_engines_end(loop: EngineLoop) -> None:
    Faulty(loop, lambda plan: MemoryError())
    for handle in range(2 * LOST_STEPS):
        loop.submit(request(handle, PROMPT[handle % 8 :]))
        assert run(loop)[handle].end.error_code == "OUT_OF_MEMORY"


def test_who_is_tried_alone_and_finds_little_memory_is_computed_in_smaller_pieces(folder: Path) -> None:
    loops = [engine(folder, deterministic=True) for _ in range(2)]
    culprit = 1

    def fault(plan: StepPlan) -> Exception | None:
        if any(row.handle == culprit for row in plan.rows):
            return RuntimeError("boom")
        return MemoryError() if sum(len(row.token_ids) for row in plan.rows) > 8 else None

    Faulty(loops[1], fault)
    for loop in loops:
        for handle in range(3):
            loop.submit(request(handle, PROMPT[handle:], ignore_eos=True))
    healthy, harmed = (run(loop) for loop in loops)
    assert harmed[culprit].end.error_code == "ENGINE_STEP_FAILED"
    for handle in (0, 2):
        assert harmed[handle].token_ids == healthy[handle].token_ids
        assert harmed[handle].end.preemptions == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_numeric_fault_ends_its_own_request_only(folder: Path, backend: str) -> None:
    loops = [engine(folder, deterministic=True, backend=backend) for _ in range(2)]
    for loop in loops:
        for handle in range(3):
            loop.submit(request(handle, PROMPT[handle:], ignore_eos=True))
        loop.step()
    runner: Any = loops[1]._runner
    victim = loops[1]._requests[1][0]
    held(runner._kv)[:, :, victim.blocks[0]] = math.nan
    healthy, harmed = (run(loop) for loop in loops)
    assert harmed[1].end.error_code == "NUMERIC_FAULT"
    for handle in (0, 2):
        assert harmed[handle].token_ids == healthy[handle].token_ids


def test_pages_full_of_nan_never_reach_an_answer(folder: Path) -> None:
    loops = [engine(folder, deterministic=deterministic) for deterministic in (True, True, False)]
    for i, loop in enumerate(loops):
        loop.submit(request(0, PROMPT, ignore_eos=True))
        run(loop)
        if i:
            runner: Any = loop._runner
            held(runner._kv)[:, :, : loop.options.kv_blocks] = math.nan
        for handle in range(3):
            loop.submit(request(handle, PROMPT[handle:], ignore_eos=True))
    clean, dirty, fast = (run(loop) for loop in loops)
    for handle in range(3):
        assert clean[handle].token_ids == dirty[handle].token_ids
        assert fast[handle].end.reason is EndReason.LENGTH


def test_a_page_that_changes_scope_is_scrubbed_before_its_new_owner_runs(folder: Path) -> None:
    loop = engine(folder, kv_blocks=8)
    scrubbed: list[tuple[int, ...]] = []
    runner: Any = loop._runner
    execute = runner.execute

    def recording(plan: StepPlan) -> StepResult:
        scrubbed.append(plan.scrub)
        result: StepResult = execute(plan)
        return result

    runner.execute = recording
    for handle, scope in enumerate("aab"):
        loop.submit(request(handle, PROMPT, max_tokens=30, scope=scope, ignore_eos=True))
        run(loop)
    per_request = [{page for plan in scrubbed[i * 30 : i * 30 + 30] for page in plan} for i in range(3)]
    assert per_request[:2] == [set(), set()]
    assert len(per_request[2]) == 7  # 54 stored tokens on pages of 8, each used before by scope a


def test_text_arrives_in_whole_characters(loop: EngineLoop) -> None:
    loop.submit(request(0, PROMPT, max_tokens=100, temperature=3.0, seed=5, ignore_eos=True))
    answer = run(loop)[0]
    vocabulary = loop._vocabulary
    assert answer.text == b"".join(vocabulary[t] for t in answer.token_ids).decode(errors="replace")
    assert torch.tensor(answer.token_ids).unique().numel() > 50
