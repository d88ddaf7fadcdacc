"""The KV page pool: pages are conserved, shared by reference, and scrubbed between scopes."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine.block_pool import BlockPool, OutOfBlocksError


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(num_blocks=4, block_size=16)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (64, 4)])
def test_a_partly_filled_page_counts_as_a_page(pool: BlockPool, num_tokens: int, blocks: int) -> None:
    assert pool.blocks_for(num_tokens) == blocks


def test_an_allocation_that_does_not_fit_takes_nothing(pool: BlockPool) -> None:
    pool.allocate(3, "a")
    with pytest.raises(OutOfBlocksError) as error:
        pool.allocate(2, "a")
    assert (error.value.wanted, error.value.free) == (2, 1)
    assert pool.num_free == 1


def test_a_shared_page_is_free_only_after_its_last_owner_leaves(pool: BlockPool) -> None:
    blocks = pool.allocate(1, "a").blocks
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_owned == 1
    pool.release(blocks)
    assert pool.num_owned == 0


def test_a_page_is_dirty_exactly_when_it_changes_scope(pool: BlockPool) -> None:
    first = pool.allocate(4, "a")
    assert first.dirty == ()
    pool.release(first.blocks)
    again = pool.allocate(2, "a")
    other = pool.allocate(2, "b")
    assert again.dirty == ()
    assert other.dirty == other.blocks


def test_releasing_a_free_page_is_refused_and_changes_nothing(pool: BlockPool) -> None:
    blocks = pool.allocate(2, "a").blocks
    pool.release(blocks[:1])
    with pytest.raises(ValueError, match="no owner"):
        pool.release(blocks)
    with pytest.raises(ValueError, match="no owner"):
        pool.release(blocks[1:] * 2)
    assert pool.num_owned == 1


@pytest.mark.parametrize(("num_blocks", "block_size"), [(4, 0), (-1, 16)])
def test_an_impossible_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="not possible"):
        BlockPool(num_blocks, block_size)


class PoolMachine(RuleBasedStateMachine):
    """Any interleaving of allocate, share and release conserves pages."""

    owned = Bundle("owned")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=8, block_size=4)
        self.refs: dict[int, int] = {}
        self.scope_of: dict[int, str] = {}

    @rule(target=owned, count=st.integers(0, 5), scope=st.sampled_from("abc"))
    def allocate(self, count: int, scope: str) -> object:
        if count > self.pool.num_free:
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count, scope)
            return multiple()
        allocation = self.pool.allocate(count, scope)
        foreign = {i for i in allocation.blocks if self.scope_of.get(i, scope) != scope}
        assert set(allocation.dirty) == foreign
        for i in allocation.blocks:
            assert self.refs.get(i, 0) == 0
            self.refs[i], self.scope_of[i] = 1, scope
        return allocation.blocks

    @rule(target=owned, blocks=owned)
    def share(self, blocks: tuple[int, ...]) -> object:
        if any(self.refs[i] == 0 for i in blocks):
            return multiple()
        self.pool.share(blocks)
        for i in blocks:
            self.refs[i] += 1
        return blocks

    @rule(blocks=consumes(owned))
    def release(self, blocks: tuple[int, ...]) -> None:
        self.pool.release(blocks)
        for i in blocks:
            self.refs[i] -= 1

    @invariant()
    def pages_are_conserved(self) -> None:
        self.pool.check()
        assert self.pool.num_owned == sum(count > 0 for count in self.refs.values())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
