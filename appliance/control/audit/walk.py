"""Walk over the rows of the log and check each by itself: number, leaf, chain, and every column against the body.

What a row cannot show by itself, that all of it was written anew with hashes that fit, the signatures show; see
`verify`.
"""

import hashlib
from collections.abc import Sequence

from appliance.control.audit.record import frame
from appliance.control.audit.store import Row

NO_CHAIN = bytes(32)
_NONCE = 32  # characters: 16 bytes in hex


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
            if not states(body, row):
                raise BadRow(sequence, row, "a column differs from the body")
            if chain != row[13]:
                raise BadRow(sequence, row, "the chain hash does not follow from the record before")
            if row[7] == "intent":
                self.open_intents.add(row[5])
            elif row[7] == "outcome":
                self.open_intents.discard(row[5])
            leaves.append(leaf)
            self.sequence, self._chain = sequence, chain
        return leaves


def states(body: bytes, row: Row) -> bool:
    """Whether the body is what the writer makes of these columns, with any facts and any nonce.

    That is the same as to parse the body and compare its fields, at a third of the time: no string of JSON holds a
    bare quote, so what is framed by the same text at both ends has the same fields.
    """
    sequence, utc_ns, mono_ns, boot, clock, request_id, kind, phase, tenant, actor, decision = row[:11]
    try:
        text, request = str(body, "utf-8"), str(request_id, "utf-8")
        fixed = frame(boot, clock, kind, phase, tenant, actor, decision)
        before, between, after = fixed.around_facts(sequence, utc_ns, mono_ns, request)
    except (UnicodeDecodeError, TypeError):
        return False
    nonce = len(text) - len(after) - _NONCE
    return text.startswith(before) and text.endswith(between, len(before), nonce) and text.endswith(after)
