"""The right edge of an RFC 9162 Merkle tree: append a leaf in O(log n), and give the root at any time.

A node is named (level, index): level 0 are the leaves, and node (l, i) covers leaves i*2^l .. (i+1)*2^l - 1. Only
complete subtrees are nodes; the root over an incomplete right edge is computed from the edge and never stored.

Source: RFC 9162, section 2.1.1 (Merkle tree hash).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

EMPTY_ROOT = hashlib.sha256().digest()


class Node(NamedTuple):
    """A complete subtree: its name and its hash."""

    level: int
    position: int
    hash: bytes


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Edge:
    """The complete subtrees whose concatenation is the tree, widest first.

    Args:
        size: leaves in the tree.
        hashes: hashes of the nodes `edge_nodes(size)` names, in that order.

    Raises:
        ValueError: the number of hashes does not fit the size.
    """

    __slots__ = ("_hashes", "size")

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if len(hashes) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} edge nodes, not {len(hashes)}")
        self.size = size
        self._hashes = list(hashes)

    def copy(self) -> "Edge":
        """An edge that grows independently of this one."""
        return Edge(self.size, self._hashes)

    def append(self, leaf: bytes) -> list[Node]:
        """Add a leaf hash; the nodes it completes, the leaf first."""
        completed = [Node(0, self.size, leaf)]
        level, index, value = 0, self.size, leaf
        while index & 1:
            value = node_hash(self._hashes.pop(), value)
            level, index = level + 1, index >> 1
            completed.append(Node(level, index, value))
        self._hashes.append(value)
        self.size += 1
        return completed

    def root(self) -> bytes:
        """The Merkle tree hash over all leaves."""
        if not self._hashes:
            return EMPTY_ROOT
        value = self._hashes[-1]
        for left in reversed(self._hashes[:-1]):
            value = node_hash(left, value)
        return value


def edge_nodes(size: int) -> list[tuple[int, int]]:
    """(level, index) of the complete subtrees a tree of `size` leaves consists of, widest first."""
    names, start = [], 0
    for level in range(size.bit_length() - 1, -1, -1):
        if size >> level & 1:
            names.append((level, start >> level))
            start += 1 << level
    return names
