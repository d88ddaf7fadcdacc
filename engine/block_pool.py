"""Ref-counted pages of the paged KV cache: who owns which page, what is kept, and what must be scrubbed.

A page (block) holds the keys and values of `block_size` consecutive tokens for every layer. The pool only
does the book-keeping; tensors live in the model runner. Pages are handed to a *scope*, the engine's opaque
name for a tenant: a page that last held another scope's tokens is reported as dirty, and the runner zeroes it
before its new owner can read it.

A page that is full and computed can be registered for its tokens (`engine.prefix_cache`). When its last owner
leaves it is cached: later requests of the same root may own it again, until its place is needed.

Invariant, checked by `check()`: every page is free, cached or owned, exactly one of them, and
free + cached + owned = total.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
SOSP 2023, section 4.2 (block tables) and 4.4 (reference counts for shared pages).
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.prefix_cache import START, PrefixCache


class OutOfBlocksError(Exception):
    """The pool cannot supply the pages asked for; nothing was allocated."""

    code = "KV_POOL_EXHAUSTED"

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} KV pages wanted, {free} free or cached")
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
        num_blocks: pages in the pool, none for an encoder; page ids are 0 .. num_blocks - 1.
        block_size: tokens per page.

    Raises:
        ValueError: the number is negative, or the size not positive.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 0 or block_size <= 0:
            raise ValueError(f"a pool of {num_blocks} pages of {block_size} tokens is not possible")
        self.block_size = block_size
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._cache = PrefixCache()

    @property
    def num_blocks(self) -> int:
        """Pages in the pool."""
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Pages that nobody owns and that hold nothing to be kept."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody owns and that hold a prefix which may be asked for again."""
        return self._cache.num_parked

    @property
    def num_available(self) -> int:
        """Pages that can be allocated."""
        return self.num_free + self.num_cached

    @property
    def num_owned(self) -> int:
        """Pages with at least one owner."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Pages needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, root: bytes, tokens: Sequence[int], limit: int) -> tuple[int, ...]:
        """The registered pages, whole ones, that hold the beginning of `tokens[:limit]`; nobody owns them more."""
        size = self.block_size
        pages = (tokens[end - size : end] for end in range(size, limit + 1, size))
        return tuple(self._cache.match(root, pages))

    def register(self, root: bytes, parent: int | None, block: int, tokens: Sequence[int]) -> int:
        """Enter the owned page `block` as holding `tokens` behind the page `parent`; None for the first page.

        When two requests have computed the same page, the one that comes second gives its own up for the one that
        is registered: each prefix is held once.

        Returns:
            The page that the owner of `block` owns from now on in its place.
        """
        kept = self._cache.enter(root, START if parent is None else parent, tokens, block)
        if kept != block:
            self.share((kept,))
            self.release((block,))
        return kept

    def allocate(self, count: int, scope: str) -> Allocation:
        """Take `count` pages for `scope`, all or none; free ones first, then cached ones.

        Raises:
            OutOfBlocksError: fewer than `count` pages are free or cached.
        """
        if count > self.num_available:
            raise OutOfBlocksError(count, self.num_available)
        while count > self.num_free:
            self._free.append(self._cache.evict())
        taken = tuple(self._free.popleft() for _ in range(count))
        dirty = tuple(i for i in taken if self._hand_over(self._blocks[i], scope))
        return Allocation(taken, dirty)

    def share(self, blocks: Iterable[int]) -> None:
        """Add one owner to each of `blocks`, which must be owned or cached already.

        Raises:
            ValueError: a page is free.
        """
        wanted = list(blocks)
        for i in wanted:
            if self._blocks[i].ref_count == 0 and i not in self._cache:
                raise ValueError(f"KV page {i} has no owner to spare")
        for i in wanted:
            if self._blocks[i].ref_count == 0:
                self._cache.revive(i)
            self._blocks[i].ref_count += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one owner of each of `blocks`; a page without owners is cached if it is registered, else free.

        Of a request's pages the last is the first to be given up later: without those before it, it is of no use.

        Raises:
            ValueError: a page has no owner.
        """
        for i in reversed(self._owned(blocks)):
            block = self._blocks[i]
            block.ref_count -= 1
            if block.ref_count == 0 and i in self._cache:
                self._cache.park(i, block.last_scope or "")
            elif block.ref_count == 0:
                self._free.append(i)

    def discard(self, blocks: Collection[int]) -> None:
        """Unregister `blocks` and all pages behind them: what they hold must not be used again."""
        self._free.extend(self._cache.drop(blocks))

    def forget(self, root: bytes) -> None:
        """Unregister every page of a root that nobody will ask for again."""
        self._free.extend(self._cache.drop_root(root))

    def check(self) -> None:
        """Verify the pool's invariant.

        Raises:
            RuntimeError: a page is lost, doubled, or two of free, cached and owned.
        """
        free = set(self._free)
        owned = {i for i, block in enumerate(self._blocks) if block.ref_count > 0}
        negative = [i for i, block in enumerate(self._blocks) if block.ref_count < 0]
        self._cache.check(owned)
        cached = {i for i in range(self.num_blocks) if i in self._cache} - owned
        doubled = len(free) != len(self._free) or free & owned or free & cached
        if doubled or negative or len(free | owned | cached) != self.num_blocks:
            raise RuntimeError(
                f"KV pool corrupt: {len(self._free)} free, {len(cached)} cached, {len(owned)} owned, "
                f"{self.num_blocks} total"
            )

    def owners(self) -> dict[int, int]:
        """How many owners each owned page has."""
        return {i: block.ref_count for i, block in enumerate(self._blocks) if block.ref_count}

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
