"""What a session has not yet read: of bounded size, kept as it came, merged by answer when it is read late."""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from engine.protos import engine_pb2

MAX_PENDING_BYTES = 32 << 20
"""Bytes a session may leave unread before its requests are aborted; they take up to four times that (measured)."""

_ROW_BYTES = 512  # what Python keeps of a row beside its content (measured)
_FRAME_BYTES = 2 << 20  # a frame takes no further row beyond this: with the largest row, a gateway takes 16 MiB


class Outbox:
    """One session's unread rows.

    Args:
        max_bytes: unread bytes beyond which `push` reports an overflow.
    """

    def __init__(self, max_bytes: int = MAX_PENDING_BYTES) -> None:
        self._max_bytes = max_bytes
        self._step = 0
        self._rows: dict[tuple[int, int], deque[engine_pb2.Row]] = {}  # by answer, in order
        self._bytes = 0
        self._closed = False
        self._something = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def push(self, step: int, rows: Iterable[engine_pb2.Row]) -> bool:
        """Add what `step` brought; False when the session had left too much unread before.

        So one step alone, however much it brings, is no overflow.
        """
        self._step, behind = step, self._bytes
        for row in rows:
            self._rows.setdefault((row.handle, row.index), deque()).append(row)
            self._bytes += _size(row)
        self._something.set()
        self._note_room()
        return behind <= self._max_bytes

    def close(self) -> None:
        """Let `take` return None once everything is read."""
        self._closed = True
        self._something.set()

    async def take(self) -> engine_pb2.SessionResponse | None:
        """What is unread as one frame, or the first part of much, waiting for it; None at the end."""
        while not self._rows:
            if self._closed:
                return None
            self._something.clear()
            await self._something.wait()
        frame = engine_pb2.SessionResponse(step=self._step)
        room = _FRAME_BYTES
        while self._rows and room > 0:
            answer = next(iter(self._rows))
            its = self._take_of(answer, room)
            frame.rows.append(its[0] if len(its) == 1 else _merged(its))
            taken = sum(map(_size, its))
            room -= taken
            self._bytes -= taken
        self._note_room()
        return frame

    async def room(self) -> None:
        """Wait until no more is unread than may be."""
        await self._room.wait()

    def _note_room(self) -> None:
        if self._bytes <= self._max_bytes:
            self._room.set()
        else:
            self._room.clear()

    def _take_of(self, answer: tuple[int, int], room: int) -> Sequence[engine_pb2.Row]:
        """The first rows of an answer that fill `room` bytes, or all of them."""
        waiting = self._rows[answer]
        its: list[engine_pb2.Row] = []
        while waiting and room > 0:
            its.append(waiting.popleft())
            room -= _size(its[-1])
        if not waiting:
            del self._rows[answer]
        return its


def _size(row: engine_pb2.Row) -> int:
    return int(row.ByteSize()) + _ROW_BYTES


def _merged(its: Sequence[engine_pb2.Row]) -> engine_pb2.Row:
    """Rows of one answer as one; its text is joined once, for a message keeps every text it was ever given."""
    first, last = its[0], its[-1]
    merged = engine_pb2.Row(handle=first.handle, index=first.index, text="".join(row.text for row in its))
    for row in its:
        merged.token_ids.extend(row.token_ids)
        merged.logprobs.extend(row.logprobs)
        merged.prompt_logprobs.extend(row.prompt_logprobs)
        merged.values.extend(row.values)
    if last.HasField("end"):
        merged.end.CopyFrom(last.end)
    return merged
