"""Log probabilities equal those of transformers, prompt and answer, each once, whatever happens to a request."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.loop import EngineLoop
from engine.plan import StepPlan, StepResult, TokenLogprob
from tests.engine.test_loop import Saboteur
from tests.engine.test_parity import OPTIONS, transformers_model
from tests.engine.tiny import VOCAB, Answer, engine, request, run, save_llama

PROMPT = torch.randint(2, VOCAB, (70,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return transformers_model(folder)


def expected(oracle: Any, tokens: list[int]) -> torch.Tensor:
    """Log probabilities [len(tokens) - 1, vocabulary] of every token but the first."""
    with torch.no_grad():
        logits = oracle(torch.tensor([tokens])).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1)


def check(found: list[TokenLogprob], tokens: list[int], logs: torch.Tensor, top: int) -> None:
    """Each token in order, its numbers as in its row of `logs`."""
    assert [one.token_id for one in found] == tokens
    for one, row in zip(found, logs, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        assert [logprob for _, logprob in one.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert [float(row[token]) for token, _ in one.top] == pytest.approx(
            row.topk(top).values.tolist(), abs=1e-4
        )
        higher = int((row > row[one.token_id] + 1e-4).sum()), int((row >= row[one.token_id] - 1e-4).sum())
        assert higher[0] < one.rank <= higher[1]
        if one.rank <= top:
            assert one.top[one.rank - 1] == (one.token_id, one.logprob)


def ask(loop: EngineLoop, **rest: Any) -> Answer:
    loop.submit(request(0, PROMPT, **({"ignore_eos": True, "max_tokens": 10} | rest)))
    return run(loop)[0]


@pytest.mark.parametrize("options", OPTIONS)
def test_prompt_and_answer_have_the_log_probabilities_of_transformers(
    folder: Path, oracle: Any, options: str
) -> None:
    loop = engine(folder, **OPTIONS[options])
    for handle, (wanted, prompt_wanted) in enumerate([(5, 3), (None, 20), (0, None), (None, None)]):
        sampled = {"temperature": 1.5, "seed": handle, "top_k": 30, "logit_bias": ((7, 3.0),)}
        loop.submit(
            request(handle, PROMPT, 8, ignore_eos=True, logprobs=wanted, prompt_logprobs=prompt_wanted, **sampled)
        )
    answers = run(loop)
    for handle, (wanted, prompt_wanted) in enumerate([(5, 3), (None, 20), (0, None), (None, None)]):
        answer = answers[handle]
        logs = expected(oracle, PROMPT + answer.token_ids)
        check(
            answer.logprobs,
            answer.token_ids if wanted is not None else [],
            logs[69:][: 8 if wanted is not None else 0],
            wanted or 0,
        )
        judged = PROMPT[1:] if prompt_wanted is not None else []
        check(answer.prompt_logprobs, judged, logs[: len(judged)], prompt_wanted or 0)


def test_they_are_of_the_model_whatever_changes_the_draw(folder: Path, oracle: Any) -> None:
    loop = engine(folder)
    forced = ask(loop, logprobs=2, logit_bias=((9, 100.0),), presence_penalty=1.0, repetition_penalty=1.2)
    assert set(forced.token_ids) == {9}
    check(forced.logprobs, forced.token_ids, expected(oracle, PROMPT + forced.token_ids)[69:], 2)


def test_tokens_cut_off_by_a_stop_have_theirs_too(folder: Path) -> None:
    loop = engine(folder, deterministic=True)
    free = ask(loop, max_tokens=30, logprobs=1)
    stop = free.text[9:12]
    cut = ask(loop, max_tokens=30, logprobs=1, strings=(stop,))
    assert len(cut.token_ids) < 30
    assert cut.logprobs == free.logprobs[: len(cut.token_ids)]
    token = free.token_ids[4]
    ended = ask(loop, max_tokens=30, logprobs=1, token_ids=frozenset({token}))
    assert ended.logprobs == free.logprobs[: free.token_ids.index(token) + 1]


def test_prompt_tokens_come_before_the_answer_chunk_by_chunk(folder: Path) -> None:
    loop = engine(folder, max_step_tokens=20, max_running=2)
    loop.submit(request(0, PROMPT, 2, ignore_eos=True, prompt_logprobs=0))
    counts = []
    while loop.has_work:
        counts += [(len(row.prompt_logprobs), len(row.token_ids)) for row in loop.step()]
    assert counts == [(20, 0), (20, 0), (20, 0), (9, 1), (0, 1)]


def test_a_prompt_of_one_token_has_none(folder: Path) -> None:
    loop = engine(folder)
    loop.submit(request(0, [5], 1, ignore_eos=True, prompt_logprobs=3, logprobs=3))
    answer = run(loop)[0]
    assert (len(answer.prompt_logprobs), len(answer.logprobs)) == (0, 1)


@pytest.mark.parametrize("salt", [b"", b"salt"])
def test_who_loses_its_pages_gets_each_prompt_token_once_and_the_same_numbers(folder: Path, salt: bytes) -> None:
    def ask_all(loop: EngineLoop) -> dict[int, Answer]:
        for handle in range(6):
            wanted = request(
                handle, PROMPT[handle:], 60, ignore_eos=True, prompt_logprobs=2, logprobs=2, salt=salt
            )
            loop.submit(wanted)
        return run(loop)

    roomy = ask_all(engine(folder, deterministic=True, kv_blocks=200))
    loop = engine(folder, deterministic=True, kv_blocks=30, max_step_tokens=32, max_running=6)
    tight = ask_all(loop)
    assert loop.status().preemptions > 0
    for handle, answer in tight.items():
        assert answer.prompt_logprobs == roomy[handle].prompt_logprobs
        assert [one.token_id for one in answer.prompt_logprobs] == PROMPT[handle + 1 :]
        assert answer.logprobs == roomy[handle].logprobs


def test_a_prompt_that_loses_its_pages_half_way_is_judged_once(folder: Path) -> None:
    loop = engine(folder, deterministic=True, max_step_tokens=24, max_running=4)
    judged = request(0, PROMPT, 4, ignore_eos=True, prompt_logprobs=1)
    loop.submit(judged)
    found = [one for _ in range(2) for row in loop.step() for one in row.prompt_logprobs]
    loop.scheduler._preempt(judged)
    loop.scheduler.pool.forget(loop.scheduler._lineage.root(judged))  # as others who need the pages would have it
    rest = run(loop)[0]
    assert judged.preemptions == 1
    assert judged.recomputed_tokens == 48
    whole = engine(folder, deterministic=True)
    whole.submit(request(0, PROMPT, 4, ignore_eos=True, prompt_logprobs=1))
    assert found + rest.prompt_logprobs == run(whole)[0].prompt_logprobs


def test_a_prompt_in_the_cache_is_judged_all_the_same(folder: Path) -> None:
    loop = engine(folder, deterministic=True)
    first = ask(loop, prompt_logprobs=1, salt=b"s")
    again = ask(loop, prompt_logprobs=1, salt=b"s")
    assert again.prompt_logprobs == first.prompt_logprobs
    assert len(again.prompt_logprobs) == 69


def test_a_step_that_is_carried_out_again_reports_once(folder: Path) -> None:
    loop = engine(folder, deterministic=True)
    clean = ask(loop, logprobs=1, prompt_logprobs=1, repetition_penalty=1.5, frequency_penalty=0.5)
    harmed = engine(folder, deterministic=True)
    harmed._runner = Saboteur(harmed._runner, 1)
    harmed.submit(request(1, PROMPT[:20]))
    again = ask(harmed, logprobs=1, prompt_logprobs=1, repetition_penalty=1.5, frequency_penalty=0.5)
    assert again.token_ids == clean.token_ids
    assert again.logprobs == clean.logprobs
    assert again.prompt_logprobs == clean.prompt_logprobs


def test_logits_of_a_long_prompt_are_never_all_there_at_once(folder: Path) -> None:
    loop = engine(folder, max_step_tokens=512)
    runner: Any = loop._runner
    compute, sizes = runner._ops.logits, []

    def recording(x: Any, head: Any, tokens: Any, *scaling: Any) -> Any:
        sizes.append(len(tokens))
        return compute(x, head, tokens, *scaling)

    runner._ops.logits = recording
    loop.submit(request(0, PROMPT * 3, 1, ignore_eos=True, prompt_logprobs=1))
    assert len(run(loop)[0].prompt_logprobs) == 209
    assert max(sizes) <= 64


def test_numbers_that_overflow_in_a_judged_prompt_end_the_request(folder: Path) -> None:
    loop = engine(folder, max_step_tokens=40, max_running=2)
    runner: Any = loop._runner
    compute = runner._ops.logits
    runner._ops.logits = lambda x, head, tokens, *scaling: compute(x, head, tokens, *scaling) * float("inf")
    loop.submit(request(0, PROMPT, 4, prompt_logprobs=1))
    rows = loop.step()
    assert rows[0].end is not None
    assert rows[0].end.error_code == "NUMERIC_FAULT"
    assert rows[0].prompt_logprobs == ()


@pytest.mark.parametrize("bad", [{"logprobs": 21}, {"prompt_logprobs": -1}], ids=str)
def test_more_than_there_may_be_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(EngineError, match="INVALID_SAMPLING"):
        request(0, PROMPT, **bad)


class Twice:
    """A runner that carries out every step twice, as if the first time had come to nothing."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def execute(self, plan: StepPlan) -> StepResult:
        self.runner.execute(plan)
        result: StepResult = self.runner.execute(plan)
        return result


def test_penalties_count_a_token_once_however_often_its_step_is_carried_out(folder: Path) -> None:
    rest = {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.3, "max_tokens": 40}
    loops = [engine(folder, deterministic=True, max_step_tokens=24, max_running=3) for _ in range(2)]
    loops[1]._runner = Twice(loops[1]._runner)
    once, twice = (ask(loop, **rest) for loop in loops)
    assert once.token_ids == twice.token_ids
    assert once.token_ids != ask(engine(folder, deterministic=True), max_tokens=40).token_ids
