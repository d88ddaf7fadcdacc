"""Walk over the rows of the log and check each by itself: number, leaf, chain, and every column against the body.

What a row cannot show by itself, that all of it was written anew with hashes that fit, the signatures show; see
`verify`.
"""

import hashlib
from collections.abc import Sequence

from appliance.control.audit.record import VERSION, frame, quote
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
        leaves: list[bytes] = []
        try:
            self._check(rows, leaves)
        finally:
            self.sequence += len(leaves)
        return leaves

    def _check(self, rows: Sequence[Row], leaves: list[bytes]) -> None:
        """The loop that verification spends its time in: no attribute and no name is looked up twice."""
        sha256, chain, intents, add = hashlib.sha256, self._chain, self.open_intents, leaves.append
        for sequence, row in enumerate(rows, self.sequence + 1):
            body, phase = row[11], row[7]
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
            if phase == "intent":
                intents.add(row[5])
            elif phase == "outcome":
                intents.discard(row[5])
            add(leaf)
        self._chain = chain


def states(body: bytes, row: Row) -> bool:
    """Whether the body is what the writer makes of these columns, with any facts and any nonce.

    That is the same as to parse the body and compare its fields, at a third of the time: no string of JSON holds a
    bare quote, so what is framed by the same text at both ends has the same fields.
    """
    sequence, utc_ns, mono_ns, boot, clock, request_id, kind, phase, tenant, actor, decision, *_ = row
    try:
        before, mono, request, utc = frame(boot, clock, kind, phase, tenant, actor, decision)
        text, name = str(body, "utf-8"), quote(str(request_id, "utf-8"))
    except (UnicodeDecodeError, TypeError):
        return False
    between = f'{mono}{mono_ns},"nonce":"'
    after = f'{request}{name},"seq":{sequence}{utc}{utc_ns},"v":{VERSION}}}'
    return (
        text.startswith(before)
        and text.endswith(after)
        and text.endswith(between, len(before), len(text) - len(after) - _NONCE)
    )
