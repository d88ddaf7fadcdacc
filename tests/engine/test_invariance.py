"""What an answer may not depend on: batch mates, chunks, pages, slots, cache hits, preemptions.

Bit for bit in deterministic mode.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.loop import EngineLoop
from engine.request import Request
from tests.engine.tiny import VOCAB, engine, record_logits, request, run, save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, seed=3)
    return folder


def requests(count: int) -> list[Request]:
    """Requests of all lengths; every second one samples."""
    rng = random.Random(4)
    return [
        request(
            i,
            [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 2, 15, 16, 17, 33, 60, 90]))],
            max_tokens=rng.randrange(1, 20),
            scope=rng.choice("ab"),
            ignore_eos=True,
            temperature=float(i % 2),
            seed=i,
            top_p=0.95,
        )
        for i in range(count)
    ]


def answers_and_logits(
    folder: Path, count: int, waves: int = 1, **options: Any
) -> tuple[dict[int, list[int]], dict[tuple[int, int], torch.Tensor]]:
    """Tokens and logits of `count` requests, submitted in `waves` that start a step apart."""
    loop = engine(folder, **({"kv_blocks": 600} | options))
    seen = record_logits(loop)
    tokens: dict[int, list[int]] = {}
    waiting = requests(count)
    size = -(-count // waves)
    while waiting or loop.has_work:
        for one in waiting[:size]:
            loop.submit(one)
        del waiting[:size]
        for row in loop.step():
            tokens.setdefault(row.handle, []).extend(row.token_ids)
        loop.scheduler.check()
    return tokens, seen


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[int, list[int]], dict[tuple[int, int], torch.Tensor]]:
    """Tokens and logits of 32 requests, each alone in its engine, in deterministic mode."""
    loop = engine(folder, deterministic=True)
    seen = record_logits(loop)
    tokens = {}
    for one in requests(32):
        loop.submit(one)
        tokens[one.handle] = run(loop)[one.handle].token_ids
    return tokens, seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"waves": 8},
        {"max_running": 3},
        {"max_step_tokens": 24, "max_running": 9, "waves": 4},
        {"max_step_tokens": 40, "waves": 32},
    ],
    ids=str,
)
def test_in_deterministic_mode_32_requests_have_the_bits_they_have_alone(
    folder: Path, alone: tuple[dict[int, list[int]], dict[tuple[int, int], torch.Tensor]], options: dict[str, int]
) -> None:
    tokens, logits = answers_and_logits(folder, 32, deterministic=True, **options)
    assert tokens == alone[0]
    assert logits.keys() == alone[1].keys()
    assert [key for key in logits if not torch.equal(logits[key], alone[1][key])] == []


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 1},
        {"block_size": 16},
        {"block_size": 24, "deterministic": True, "backend": "torch"},
        {"block_size": 5, "max_step_tokens": 9, "max_running": 4},
        {"max_step_tokens": 11, "max_running": 3, "waves": 8},
        {"backend": "reference", "max_step_tokens": 30, "max_running": 5},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_pages_chunks_or_backend(
    folder: Path, alone: tuple[dict[int, list[int]], dict[tuple[int, int], torch.Tensor]], options: dict[str, int]
) -> None:
    tokens, logits = answers_and_logits(folder, 12, **options)
    assert tokens == {handle: alone[0][handle] for handle in tokens}
    for key, row in logits.items():
        torch.testing.assert_close(row, alone[1][key], rtol=0, atol=1e-4)


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others(folder: Path) -> None:
    loop = engine(folder)
    prompt = list(range(30, 50))
    for handle, seed in enumerate([1, 2, 1, 3]):
        loop.submit(request(handle, prompt, max_tokens=20, temperature=1.5, seed=seed, ignore_eos=True))
    answers = run(loop)
    assert answers[0].token_ids == answers[2].token_ids
    assert len({tuple(answers[i].token_ids) for i in (0, 1, 3)}) == 3


def family(salted: bool) -> list[Request]:
    """Requests whose prompts begin alike, in two scopes, with answers far longer than a page."""
    rng = random.Random(9)
    trunk = [rng.randrange(2, VOCAB) for _ in range(50)]
    requests = []
    for i in range(14):
        prompt = trunk[: rng.choice([0, 8, 19, 32, 50])] + [rng.randrange(2, VOCAB) for _ in range(1 + i % 5)]
        scope = rng.choice("ab")
        rest = {"temperature": float(i % 2), "seed": i, "scope": scope, "salt": scope.encode() if salted else b""}
        requests.append(request(i, prompt, rng.randrange(20, 40), ignore_eos=True, **rest))
    return requests


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", "float32"), ("cpu", "bfloat16"), ("reference", "float32")]
)
def test_in_deterministic_mode_bits_do_not_tell_what_was_hit_or_computed_again(
    folder: Path, backend: str, dtype: str
) -> None:
    def compute(salted: bool, **options: Any) -> tuple[EngineLoop, dict[tuple[int, int], torch.Tensor]]:
        loop = engine(folder, deterministic=True, backend=backend, dtype=dtype, **({"block_size": 4} | options))
        seen = record_logits(loop)
        turns = family(salted)
        for one in turns:
            loop.submit(one)
        run(loop)
        for one in turns:  # the same again with the answer before: its pages were filled token by token
            again = request(100 + one.handle, one.tokens, 2, one.scope, salt=one.salt, ignore_eos=True)
            loop.submit(again)
        run(loop)
        return loop, seen

    plain, expected = compute(salted=False, kv_blocks=600)
    assert (plain.status().tokens_cached, plain.status().preemptions) == (0, 0)
    hits, found = compute(salted=True, kv_blocks=600, max_running=5)
    assert hits.status().tokens_cached > 900
    scarce, computed_again = compute(salted=False, kv_blocks=34)
    assert scarce.status().tokens_recomputed > 100
    both, in_pieces = compute(salted=True, kv_blocks=34, max_step_tokens=13, max_running=7)
    assert both.status().preemptions * both.status().tokens_cached > 0
    for logits in (found, computed_again, in_pieces):
        assert logits.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(logits[key], expected[key])] == []
