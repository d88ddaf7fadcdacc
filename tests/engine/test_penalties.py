"""What an answer already holds, and what it may not hold yet, changes its tokens as in transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.loop import EngineLoop
from tests.engine.test_parity import transformers_model
from tests.engine.tiny import VOCAB, Answer, engine, request, run, save_llama

PROMPT = torch.randint(2, VOCAB, (50,), generator=torch.Generator().manual_seed(8)).tolist()
SETTINGS: dict[str, dict[str, Any]] = {
    "at once": {},
    "in chunks": {"max_step_tokens": 13, "max_running": 5},
    "deterministic": {"deterministic": True},
    "reference": {"backend": "reference"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return transformers_model(folder)


def ask(loop: EngineLoop, **rest: Any) -> Answer:
    loop.submit(request(0, PROMPT, **({"ignore_eos": True, "max_tokens": 40} | rest)))
    return run(loop)[0]


def greedy(oracle: Any, count: int, change: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> list[int]:
    """An answer made of the likeliest token of transformers' logits after `change`."""
    tokens = list(PROMPT)
    for _ in range(count):
        with torch.no_grad():
            logits = oracle(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(change(logits, tokens[len(PROMPT) :]).argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_repetition_penalty_gives_the_answer_of_transformers(folder: Path, oracle: Any, settings: str) -> None:
    ours = ask(engine(folder, **SETTINGS[settings]), repetition_penalty=1.4).token_ids
    theirs = oracle.generate(
        torch.tensor([PROMPT]), do_sample=False, repetition_penalty=1.4, min_new_tokens=40, max_new_tokens=40
    )[0, len(PROMPT) :]
    assert ours == theirs.tolist()


@pytest.mark.parametrize("settings", SETTINGS)
def test_presence_and_frequency_are_taken_off_for_tokens_of_the_answer_alone(
    folder: Path, oracle: Any, settings: str
) -> None:
    def change(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        times = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=VOCAB)
        return logits - 0.9 * (times > 0) - 0.4 * times

    ours = ask(engine(folder, **SETTINGS[settings]), presence_penalty=0.9, frequency_penalty=0.4).token_ids
    assert ours == greedy(oracle, 40, change)
    assert ours != ask(engine(folder)).token_ids


def test_what_is_remembered_survives_the_loss_of_pages_and_prefixes_of_the_cache(folder: Path) -> None:
    rest = {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "logit_bias": ((30, 0.5),), "temperature": 0.7}

    def ask_all(loop: EngineLoop) -> dict[int, list[int]]:
        for handle in range(6):
            loop.submit(request(handle, PROMPT, 70, ignore_eos=True, salt=b"s", seed=handle, **rest))
        return {handle: answer.token_ids for handle, answer in run(loop).items()}

    roomy, loop = (
        engine(folder, deterministic=True, kv_blocks=200),
        engine(folder, deterministic=True, kv_blocks=24),
    )
    expected = ask_all(roomy)
    assert ask_all(loop) == expected
    assert loop.status().preemptions > 0
    assert ask_all(roomy) == expected  # out of the cache this time
    assert roomy.status().tokens_cached > 200


@pytest.mark.parametrize("moment", [1, 12, 30])
def test_what_is_remembered_holds_the_answer_that_is_found_in_the_cache_again(folder: Path, moment: int) -> None:
    rest = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    expected = ask(engine(folder, deterministic=True), **rest).token_ids
    loop = engine(folder, deterministic=True)
    one = request(0, PROMPT, 40, ignore_eos=True, salt=b"s", **rest)
    loop.submit(one)
    found = [token for _ in range(moment) for row in loop.step() for token in row.token_ids]
    loop.scheduler._preempt(one)
    assert found + run(loop)[0].token_ids == expected
    assert one.recomputed_tokens < 8, "less than a page: the rest was in the cache, the answer's part too"


def test_neighbours_with_penalties_change_nothing_for_others(folder: Path) -> None:
    loop = engine(folder, deterministic=True)
    alone = ask(loop, temperature=1.0, seed=4).token_ids
    loop.submit(request(1, PROMPT, 40, ignore_eos=True, repetition_penalty=2.0, temperature=0.5))
    loop.submit(request(2, PROMPT, 40, ignore_eos=True, logit_bias=((5, 50.0),), min_tokens=3))
    loop.submit(request(0, PROMPT, 40, ignore_eos=True, temperature=1.0, seed=4))
    answers = run(loop)
    assert answers[0].token_ids == alone
    assert set(answers[2].token_ids) == {5}


def test_a_slot_forgets_the_penalties_of_its_last_owner(folder: Path) -> None:
    loop = engine(folder, max_running=1)
    plain = ask(loop).token_ids
    ask(loop, repetition_penalty=3.0, logit_bias=((5, 50.0),), logprobs=3)
    after = ask(loop)
    assert after.token_ids == plain
    assert after.logprobs == []
    runner: Any = loop._runner
    assert not runner._samplers._special


@pytest.mark.parametrize("token", [VOCAB, 2**32 - 1, -1])
def test_a_bias_of_a_token_that_the_model_has_not_is_refused(folder: Path, token: int) -> None:
    loop = engine(folder)
    with pytest.raises(EngineError, match="INVALID_SAMPLING"):
        loop.submit(request(0, PROMPT, logit_bias=((token, 1.0),)))
    assert not loop.has_work


def test_no_stop_token_is_drawn_before_the_least_number_of_tokens(folder: Path) -> None:
    loop = engine(folder)
    banned = frozenset(set(ask(loop).token_ids) | {VOCAB + 7})  # one of them no token at all
    early = ask(loop, token_ids=banned)
    assert len(early.token_ids) == 1
    late = ask(loop, token_ids=banned, min_tokens=12)
    assert len(late.token_ids) > 12
    assert not set(late.token_ids[:12]) & banned
    assert late.token_ids[-1] == late.end.stop_token_id or len(late.token_ids) == 40


def test_the_models_own_end_token_waits_too_unless_it_is_ignored_anyway(folder: Path) -> None:
    loop = engine(folder)
    token = ask(loop).token_ids[0]
    for holder in (loop, loop.scheduler):
        setattr(holder, "_eos_ids", frozenset({token}))  # noqa: B010  # of both alike
    assert ask(loop, ignore_eos=False).token_ids == [token]
    late = ask(loop, ignore_eos=False, min_tokens=5)
    assert token not in late.token_ids[:5]
    assert ask(loop, ignore_eos=True, min_tokens=5).token_ids[0] == token


def test_an_answer_may_be_banned_all_tokens_and_still_goes_on(folder: Path) -> None:
    everything = frozenset(range(VOCAB))
    answer = ask(engine(folder), token_ids=everything, min_tokens=6)
    assert len(answer.token_ids) == 7


def test_a_stop_string_is_none_while_it_is_too_early(folder: Path) -> None:
    loop = engine(folder, deterministic=True)
    free = ask(loop)
    stop = free.text[2:4]
    assert len(ask(loop, strings=(stop,)).token_ids) < 8
    late = ask(loop, strings=(stop,), min_tokens=20)
    assert len(late.token_ids) >= 20
    assert late.text.startswith(free.text[:4])
