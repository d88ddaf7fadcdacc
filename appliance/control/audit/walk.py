"""Walk over the rows of the log and check each by itself: number, leaf, chain, and every column against the body.

What a row cannot show by itself, that all of it was written anew with hashes that fit, the signatures show; see
`verify`.
"""

import hashlib
from collections.abc import Sequence
from json import JSONDecoder

from appliance.control.audit.store import Row

NO_CHAIN = bytes(32)
_decode = JSONDecoder().raw_decode


class BadRow(Exception):  # noqa: N818  # a finding, not a failure
    """The first row that does not hold.

    Attributes:
        sequence: the number the row should have.
        row: the row that stands there or, when none does, the next one, if any.
    """

    def __init__(self, sequence: int, row: Row | None, what: str) -> None:
        super().__init__(f"record {sequence}: {what}")
        self.sequence = sequence
        self.row = row


class Walk:
    """Checks rows in order; stops at the first bad one.

    Args:
        sequence: number of the last row already known to be good.
        chain: its chain hash.
    """

    def __init__(self, sequence: int = 0, chain: bytes = NO_CHAIN) -> None:
        self.sequence = sequence
        self.open_intents: set[bytes] = set()
        self._chain = chain

    def block(self, rows: Sequence[Row]) -> list[bytes]:
        """Check the next rows; their leaf hashes, computed from the bodies.

        Raises:
            BadRow: at the first row that does not hold; `sequence` then counts the rows before it.
        """
        sha256, leaves, chain = hashlib.sha256, [], self._chain
        for row in rows:
            sequence, body = self.sequence + 1, row[11]
            if row[0] != sequence:
                raise BadRow(sequence, row, f"it is not there, the next is number {row[0]}")
            if not isinstance(body, bytes):
                raise BadRow(sequence, row, "it has no body")
            leaf = sha256(b"\x00" + body).digest()
            chain = sha256(b"\x02" + chain + leaf).digest()
            if leaf != row[12]:
                raise BadRow(sequence, row, "body and leaf hash do not fit")
            if columns(body) != row[:11]:
                raise BadRow(sequence, row, "a column differs from the body")
            if chain != row[13]:
                raise BadRow(sequence, row, "the chain hash does not follow from the record before")
            self._follow_intent(row)
            leaves.append(leaf)
            self.sequence, self._chain = sequence, chain
        return leaves

    def _follow_intent(self, row: Row) -> None:
        if row[7] == "intent":
            self.open_intents.add(row[5])
        elif row[7] == "outcome":
            self.open_intents.discard(row[5])


def columns(body: bytes) -> tuple[object, ...] | None:
    """The first eleven columns of `rec` as the body states them; None when it is no record."""
    try:
        fields = _decode(str(body, "utf-8"))[0]
        return (
            fields["seq"],
            fields["utc_ns"],
            fields["mono_ns"],
            fields["boot"],
            fields["clock"],
            fields["request_id"].encode(),
            fields["kind"],
            fields["phase"],
            fields["tenant"] or None,
            fields["actor"],
            fields["decision"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
