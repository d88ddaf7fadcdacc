"""What is true of the checkpoints of an honest log, and of the records a crash may leave beyond its head.

Every group commit has a checkpoint, and each holds the digest of the one before; the head holds that of the last.
So one hash a checkpoint shows that none was changed, added or taken out.

A log may be found ahead of its head, since the head is written after the commit and flushed less often. How far is
bounded (`HeadFile.settle`), and what is further ahead is no crash: it is a log cut back under an old head.
"""

import base64
from collections.abc import Iterable

from appliance.control.audit.head import LAG_NS
from appliance.control.audit.note import digest
from appliance.control.audit.store import Row


class BadCheckpoint(Exception):  # noqa: N818  # a finding, not a failure
    """A checkpoint that is not as the log wrote it, or is missing."""


def follow(notes: Iterable[tuple[int, bytes]], after: int, previous: bytes, until: int) -> bytes:
    """Follow checkpoints from one to the next; the digest of the last.

    Args:
        notes: (size, note) of those after size `after`, in order.
        after: size before the first.
        previous: digest the first has to hold.
        until: size that the last has to have.

    Raises:
        BadCheckpoint: the chain is broken, or ends elsewhere.
    """
    held = base64.b64encode(previous)
    for size, note in notes:
        lines = note.split(b"\n", 4)
        if len(lines) < 5 or lines[1] != b"%d" % size or lines[3] != held:
            raise BadCheckpoint(
                f"checkpoint {size} does not follow from checkpoint {after}:"
                " one of them was changed, or one between them was added or taken out"
            )
        after, previous = size, digest(note)
        held = base64.b64encode(previous)
    if after != until:
        raise BadCheckpoint(f"checkpoint {until} is not there, the last is {after}")
    return previous


def refuse_stray(size: int | None) -> None:
    """Raise when there is a checkpoint that no log of this length can have.

    Raises:
        BadCheckpoint: there is.
    """
    if size is not None:
        raise BadCheckpoint(f"checkpoint {size} is of no commit of this log")


def stale(first: Row, last: Row) -> str:
    """Why records from `first` to `last` cannot be what a crash left beyond the head; empty when they can be.

    Records of one commit have one time stamp, and before a commit that is `LAG_NS` younger than the last flush the
    head is flushed. So whatever lies beyond a durable head is of one boot and spans less than that.
    """
    span = last[2] - first[2]
    if first[3] == last[3] and 0 <= span < LAG_NS:
        return ""
    lasted = f"{span / 1e9:.1f} s" if first[3] == last[3] else "more than one boot"
    return (
        f"the head signs {first[0] - 1} records and the {last[0] - first[0] + 1} after it span {lasted}:"
        " no crash leaves that much, the head is an old one"
    )
