"""Which KV pages hold which tokens, so that a prompt that begins like an earlier one starts behind it.

The key of a full page is a SHA-256 chain over the token ids of the pages up to it. The chain's root holds the
scope, the salt that control gives each tenant, the model and the adapter: a prompt of another scope has other
keys, whatever its tokens are. A hash only finds a page; what a hit takes over is compared (root, page before,
tokens), so that no collision, found or made, can serve a wrong page.

Indexed pages without an owner are parked, in order of use for each scope. Eviction takes the least recently used
page of the scope that has the most parked. Were it the oldest page of all, a scope could empty the cache of every
other by flooding it with prompts (unfair), and tell from its own misses how much its neighbours ask (a side
channel). So a flood evicts its own pages, and a scope that keeps little keeps it; only the one that keeps most
notices that others need room.

The index is closed: a page's predecessor is indexed as long as it is, because owners take over and give up whole
prefixes, the last page first.

Source: Kwon et al., SOSP 2023, section 4.4 (shared prefixes); Zheng et al., "SGLang", NeurIPS 2024 (least recently
used leaves go first); Wu et al., "I Know What You Asked", NDSS 2025 (what shared caches and their order tell).
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

START = -1  # stands for the page before the first


class _Entry(NamedTuple):
    root: bytes
    parent: int
    tokens: tuple[int, ...]
    key: bytes


def chain_root(scope: str, salt: bytes, model_digest: str, adapter: str = "", private: bool = False) -> bytes:
    """Where the chain of a prompt starts: 32 bytes that differ when any of the fields does.

    Args:
        scope: whose prompt it is.
        salt: from control, one for each tenant; or a number, when `private`.
        model_digest: of the model that computed the pages.
        adapter: digest of the adapter it computed them with; empty without one.
        private: the salt is one that the engine made up for a single group of requests.
    """
    fields = (
        b"cloister prefix 1",
        bytes([private]),
        scope.encode(),
        salt,
        model_digest.encode(),
        adapter.encode(),
    )
    return hashlib.sha256(b"".join(struct.pack("<Q", len(field)) + field for field in fields)).digest()


class PrefixCache:
    """The index of full pages, and the order in which those without an owner are given up."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # a page's predecessor was entered before it
        self._by_key: dict[bytes, int] = {}
        self._parked: dict[str, OrderedDict[int, None]] = {}  # by scope, least recently used first
        self._scope_of: dict[int, str] = {}

    @property
    def num_parked(self) -> int:
        """Pages that are indexed and have no owner."""
        return len(self._scope_of)

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def match(self, root: bytes, pages: Iterable[Sequence[int]]) -> Iterator[int]:
        """The pages that hold the first of the token `pages`, in order, as far as they are known."""
        parent, key = START, root
        for tokens in pages:
            key = _key(key, tokens)
            block = self._by_key.get(key, START)
            if block == START or self._entries[block] != _Entry(root, parent, tuple(tokens), key):
                return
            yield block
            parent = block

    def enter(self, root: bytes, parent: int, tokens: Sequence[int], block: int) -> int:
        """Index `block`; returns the page that is indexed for these tokens now, which may be an older one.

        Nothing is indexed behind a page that is not, nor in place of another chain's page whose key is the same.
        """
        if parent != START and parent not in self._entries:
            return block
        key = _key(root if parent == START else self._entries[parent].key, tokens)
        entry = _Entry(root, parent, tuple(tokens), key)
        older = self._by_key.get(key)
        if older is not None:
            return older if self._entries[older] == entry else block
        self._entries[block] = entry
        self._by_key[key] = block
        return block

    def park(self, block: int, scope: str) -> None:
        """An indexed page has lost its last owner; it is the most recently used one of its scope."""
        self._parked.setdefault(scope, OrderedDict())[block] = None
        self._scope_of[block] = scope

    def revive(self, block: int) -> None:
        """A parked page has an owner again."""
        scope = self._scope_of.pop(block)
        del self._parked[scope][block]
        if not self._parked[scope]:
            del self._parked[scope]

    def evict(self) -> int:
        """Forget the page that is given up next.

        Raises:
            ValueError: none is parked.
        """
        pages = max(self._parked.values(), key=len)
        block = next(iter(pages))
        self._forget(block)
        return block

    def drop(self, blocks: Collection[int]) -> list[int]:
        """Forget `blocks` and all pages behind them; the parked ones among these, which nobody holds now."""
        gone = set(blocks) & self._entries.keys()

        def behind(block: int, entry: _Entry) -> bool:
            if entry.parent in gone:
                gone.add(block)
            return block in gone

        return self._drop(behind)

    def drop_root(self, root: bytes) -> list[int]:
        """Forget every page of a root; the parked ones among these, which nobody holds now."""
        return self._drop(lambda block, entry: entry.root == root)

    def check(self, owned: Collection[int]) -> None:
        """Verify the index against the pages that have owners.

        Raises:
            RuntimeError: a page is behind one that is not indexed, or parked and owned, or neither.
        """
        parked = {block for pages in self._parked.values() for block in pages}
        sound = (
            all(self._by_key.get(entry.key) == block for block, entry in self._entries.items()),
            len(self._by_key) == len(self._entries),
            all(e.parent == START or e.parent in self._entries for e in self._entries.values()),
            parked == self._entries.keys() - set(owned) == self._scope_of.keys(),
            sum(map(len, self._parked.values())) == len(parked),
        )
        if not all(sound):
            raise RuntimeError(f"prefix index corrupt: {len(self._entries)} pages, {len(parked)} parked, {sound}")

    def _drop(self, wanted: Callable[[int, _Entry], bool]) -> list[int]:
        dropped = [block for block, entry in self._entries.items() if wanted(block, entry)]
        parked = [block for block in dropped if block in self._scope_of]
        for block in dropped:
            self._forget(block)
        return parked

    def _forget(self, block: int) -> None:
        del self._by_key[self._entries.pop(block).key]
        if block in self._scope_of:
            self.revive(block)


def _key(before: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(before + struct.pack(f"<{len(tokens)}I", *tokens)).digest()
