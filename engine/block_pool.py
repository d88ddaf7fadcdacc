"""Ref-counted pages of the paged KV cache: who owns which page, and which pages must be scrubbed.

A page (block) holds the keys and values of `block_size` consecutive tokens for every layer. The pool only
does the book-keeping; tensors live in the model runner. Pages are handed to a *scope*, the engine's opaque
name for a tenant: a page that last held another scope's tokens is reported as dirty, and the runner zeroes it
before its new owner can read it.

Invariant, checked by `check()`: every page is free or owned, never both, and free + owned = total.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
SOSP 2023, section 4.2 (block tables) and 4.4 (reference counts for shared pages).
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class OutOfBlocksError(Exception):
    """The pool cannot supply the pages asked for; nothing was allocated."""

    code = "KV_POOL_EXHAUSTED"

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} KV pages wanted, {free} free")
        self.wanted = wanted
        self.free = free


class Allocation(NamedTuple):
    """Pages taken from the pool, and those of them that must be scrubbed before they are written."""

    blocks: tuple[int, ...]
    dirty: tuple[int, ...]


@dataclass(slots=True)
class _Block:
    ref_count: int = 0
    last_scope: str | None = None


class BlockPool:
    """A fixed number of KV pages, lent to scopes and counted by reference.

    Args:
        num_blocks: pages in the pool; page ids are 0 .. num_blocks - 1.
        block_size: tokens per page.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks <= 0 or block_size <= 0:
            raise ValueError(f"a pool of {num_blocks} pages of {block_size} tokens is not possible")
        self.block_size = block_size
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))

    @property
    def num_blocks(self) -> int:
        """Pages in the pool."""
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    @property
    def num_owned(self) -> int:
        """Pages with at least one owner."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Pages needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, scope: str) -> Allocation:
        """Take `count` pages for `scope`, all or none.

        Raises:
            OutOfBlocksError: fewer than `count` pages are free.
        """
        if count > self.num_free:
            raise OutOfBlocksError(count, self.num_free)
        taken = tuple(self._free.popleft() for _ in range(count))
        dirty = tuple(i for i in taken if self._hand_over(self._blocks[i], scope))
        return Allocation(taken, dirty)

    def share(self, blocks: Iterable[int]) -> None:
        """Add one owner to each of `blocks`, which must be owned already.

        Raises:
            ValueError: a page is free.
        """
        for i in self._owned(blocks):
            self._blocks[i].ref_count += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one owner of each of `blocks`; a page without owners is free again.

        Raises:
            ValueError: a page is already free.
        """
        for i in self._owned(blocks):
            block = self._blocks[i]
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free.append(i)

    def check(self) -> None:
        """Verify the pool's invariant.

        Raises:
            RuntimeError: a page is lost, doubled, or both free and owned.
        """
        free = set(self._free)
        owned = {i for i, block in enumerate(self._blocks) if block.ref_count > 0}
        negative = [i for i, block in enumerate(self._blocks) if block.ref_count < 0]
        if len(free) != len(self._free) or free & owned or negative or len(free | owned) != self.num_blocks:
            raise RuntimeError(
                f"KV pool corrupt: {len(self._free)} free, {len(owned)} owned, {self.num_blocks} total"
            )

    def _owned(self, blocks: Iterable[int]) -> Sequence[int]:
        """`blocks` as a list, refused whole if a page is named more often than it has owners."""
        wanted = list(blocks)
        for i, times in Counter(wanted).items():
            if self._blocks[i].ref_count < times:
                raise ValueError(f"KV page {i} has no owner to spare")
        return wanted

    @staticmethod
    def _hand_over(block: _Block, scope: str) -> bool:
        """Give a free page to `scope`; True when its content belonged to somebody else."""
        foreign = block.last_scope is not None and block.last_scope != scope
        block.ref_count = 1
        block.last_scope = scope
        return foreign
