"""The prefix cache: what is hit, who may hit it, what is given up first, and that no answer changes by it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import prefix_cache
from engine.block_pool import BlockPool
from engine.loop import EngineLoop
from engine.prefix_cache import chain_root
from tests.engine.tiny import Answer, engine, request, run, save_llama
from tests.kernels.textbook import held

PROMPT = list(range(40, 70))
SIZE = 8
ROOT = chain_root("a", b"salt", "digest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


@pytest.fixture
def loop(folder: Path) -> EngineLoop:
    return engine(folder, deterministic=True)


def ask(
    loop: EngineLoop, prompt: Sequence[int] = PROMPT, scope: str = "a", salt: bytes = b"s", **rest: Any
) -> Answer:
    loop.submit(request(0, prompt, scope=scope, salt=salt, ignore_eos=True, **rest))
    return run(loop)[0]


def test_a_repeated_prompt_is_computed_from_its_last_page_on_and_answered_alike(loop: EngineLoop) -> None:
    first, again = ask(loop), ask(loop)
    assert (first.end.cached_prompt_tokens, again.end.cached_prompt_tokens) == (0, 24)
    assert again.token_ids == first.token_ids
    assert again.end.prompt_tokens == len(PROMPT)  # the client's prompt is as long as it was
    status = loop.status()
    assert (status.tokens_prefilled, status.tokens_cached) == (30 + 6, 24)
    assert status.blocks_cached > 0


def test_of_a_prompt_that_is_known_to_its_last_token_one_page_is_computed_again(loop: EngineLoop) -> None:
    ask(loop, PROMPT[:16])
    assert ask(loop, PROMPT[:16]).end.cached_prompt_tokens == 8
    assert ask(loop, PROMPT[:17]).end.cached_prompt_tokens == 16


def test_a_conversation_that_goes_on_hits_its_own_answer(loop: EngineLoop) -> None:
    answer = ask(loop, max_tokens=20)
    turn = [*PROMPT, *answer.token_ids, 7, 8, 9]
    assert ask(loop, turn).end.cached_prompt_tokens == 48  # 49 of 50 tokens were computed


@pytest.mark.parametrize(
    ("scope", "salt", "cached"),
    [("a", b"s", 24), ("a", b"t", 0), ("b", b"s", 0), ("a", b"", 0)],
)
def test_only_the_same_scope_with_the_same_salt_hits(
    loop: EngineLoop, scope: str, salt: bytes, cached: int
) -> None:
    ask(loop)
    assert ask(loop, scope=scope, salt=salt).end.cached_prompt_tokens == cached


def test_without_a_salt_nothing_is_kept(loop: EngineLoop) -> None:
    ask(loop, salt=b"")
    assert ask(loop, salt=b"").end.cached_prompt_tokens == 0
    assert loop.status().blocks_free == loop.status().blocks_total


@pytest.mark.parametrize("field", ["scope", "salt", "model_digest", "adapter"])
def test_every_field_of_a_root_makes_another_root(field: str) -> None:
    plain = {"scope": "a", "salt": b"b", "model_digest": "c", "adapter": "d"}
    other = plain | {field: plain[field] * 2}
    assert chain_root(**plain) != chain_root(**other)
    assert chain_root("ab", b"", "c") != chain_root("a", b"b", "c")
    assert chain_root("a", b"b", "c", private=True) != chain_root("a", b"b", "c")


def test_whose_prompt_is_judged_token_by_token_computes_all_of_it_and_leaves_it_to_others(
    loop: EngineLoop,
) -> None:
    ask(loop)
    judged = ask(loop, prompt_logprobs=0)
    assert judged.end.cached_prompt_tokens == 0
    assert [report.token_id for report in judged.prompt_logprobs] == PROMPT[1:]
    fresh = PROMPT[::-1]
    ask(loop, fresh, prompt_logprobs=0)
    assert ask(loop, fresh).end.cached_prompt_tokens == 24


def test_two_who_compute_the_same_at_once_end_up_on_the_same_pages(loop: EngineLoop) -> None:
    for handle in (0, 1):
        loop.submit(request(handle, PROMPT, max_tokens=30, salt=b"s", ignore_eos=True))
    loop.step()
    owned = loop.scheduler.pool.owners()
    assert sorted(owned.values()) == [1, 1, 2, 2, 2]
    answers = run(loop)
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].end.cached_prompt_tokens == 0


def test_a_request_whose_numbers_failed_leaves_nothing_to_be_hit(loop: EngineLoop) -> None:
    healthy = ask(loop)
    loop.submit(request(0, PROMPT, salt=b"s", ignore_eos=True))
    loop.step()
    runner: Any = loop._runner
    victim = loop._requests[0][0]
    held(runner._kv)[:, :, victim.blocks[1]] = math.nan
    assert run(loop)[0].end.error_code == "NUMERIC_FAULT"
    again = ask(loop)
    assert again.end.cached_prompt_tokens == 0
    assert again.token_ids == healthy.token_ids


def test_a_page_is_not_registered_before_its_step_has_succeeded(loop: EngineLoop) -> None:
    runner: Any = loop._runner
    execute = runner.execute

    def broken(plan: object) -> None:
        raise RuntimeError("boom")

    runner.execute = broken
    assert ask(loop).end.error_code == "ENGINE_STEP_FAILED"
    runner.execute = execute
    assert ask(loop).end.cached_prompt_tokens == 0


def fill(pool: BlockPool, scope: str, tokens: Sequence[int], root: bytes = ROOT) -> list[int]:
    """Own, register and release the pages of `tokens`."""
    blocks = list(pool.allocate(pool.blocks_for(len(tokens)), scope).blocks)
    for i in range(len(tokens) // SIZE):
        blocks[i] = pool.register(root, blocks[i - 1] if i else None, blocks[i], tokens[i * SIZE : (i + 1) * SIZE])
    pool.release(blocks)
    pool.check()
    return blocks


def hit(pool: BlockPool, tokens: Sequence[int], root: bytes = ROOT) -> tuple[int, ...]:
    return pool.match(root, tokens, len(tokens))


def test_what_is_full_is_cached_and_what_is_not_is_free() -> None:
    pool = BlockPool(8, SIZE)
    blocks = fill(pool, "a", range(20))
    assert (pool.num_free, pool.num_cached, pool.num_owned) == (6, 2, 0)
    assert hit(pool, range(16)) == tuple(blocks[:2])
    assert hit(pool, [*range(8), *range(9)]) == (blocks[0],)


def test_free_pages_go_first_and_of_a_prefix_the_end_goes_first() -> None:
    pool = BlockPool(6, SIZE)
    blocks = fill(pool, "a", range(32))
    pool.allocate(2, "a")
    assert len(hit(pool, range(32))) == 4
    for left in (3, 2, 1, 0):
        pool.allocate(1, "a")
        pool.check()
        assert hit(pool, range(32)) == tuple(blocks[:left])


def test_what_was_used_last_is_given_up_last() -> None:
    pool = BlockPool(3, SIZE)
    prompts = [range(i, i + SIZE) for i in (0, 100, 200)]
    for prompt in prompts:
        fill(pool, "a", prompt)
    used = hit(pool, prompts[0])
    pool.share(used)
    pool.release(used)
    pool.allocate(2, "a")
    assert [len(hit(pool, prompt)) for prompt in prompts] == [1, 0, 0]


def test_a_flood_of_one_scope_evicts_its_own_pages() -> None:
    pool = BlockPool(10, SIZE)
    small = chain_root("b", b"salt", "digest")
    fill(pool, "b", range(16), small)
    for i in range(100):
        fill(pool, "a", range(1000 * i, 1000 * i + 24))
    assert len(hit(pool, range(16), small)) == 2


def test_an_evicted_page_is_dirty_for_another_scope() -> None:
    pool = BlockPool(2, SIZE)
    blocks = fill(pool, "a", range(16))
    allocation = pool.allocate(2, "b")
    assert sorted(allocation.dirty) == sorted(blocks)


def test_keys_that_collide_serve_nobody_a_wrong_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "_key", lambda before, tokens: b"the same for all")
    pool = BlockPool(8, SIZE)
    fill(pool, "a", range(8))
    other = chain_root("b", b"salt", "digest")
    assert hit(pool, range(100, 108)) == ()
    assert hit(pool, range(8), other) == ()
    assert len(fill(pool, "b", range(16), other)) == 2
    assert hit(pool, range(16), other) == ()
    assert len(hit(pool, range(8))) == 1


def test_what_is_discarded_takes_all_behind_it_along() -> None:
    pool = BlockPool(8, SIZE)
    blocks = fill(pool, "a", range(24))
    pool.share(blocks)
    pool.discard(blocks[1:2])
    pool.check()
    assert hit(pool, range(24)) == (blocks[0],)
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (7, 1)


def test_a_free_page_cannot_be_shared() -> None:
    pool = BlockPool(2, SIZE)
    with pytest.raises(ValueError, match="no owner"):
        pool.share([0])


def test_the_same_tokens_are_kept_for_each_scope_and_behind_each_beginning() -> None:
    pool = BlockPool(8, SIZE)
    other = chain_root("b", b"salt", "digest")
    prompts = [[*range(8), *range(8)], [*range(50, 58), *range(8)]]
    for scope, root in (("a", ROOT), ("b", other)):
        for prompt in prompts:
            fill(pool, scope, prompt, root)
    assert [len(hit(pool, prompt, root)) for root in (ROOT, other) for prompt in prompts] == [2, 2, 2, 2]
