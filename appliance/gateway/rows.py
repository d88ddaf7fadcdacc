"""One request's rows, between the worker's frames and a client that may be slow: bounded, merged, then cut off."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

import grpc

from appliance.errors import CloisterError
from engine.protos import engine_pb2

# A client that keeps up gets one message per step. Behind by more than this many rows, it gets them merged.
MERGE_AFTER = 32
# Behind by more than this, merged, it is cut off. A row counts with what Python needs to keep it.
MAX_PENDING_BYTES = 256 << 10
_ROW_BYTES = 256
# A merged row takes no further one beyond this: its message must pass clients that take 4 MiB, gRPC's default.
_MAX_MERGED_BYTES = 256 << 10


class EngineGoneError(Exception):
    """The worker died, or ended the request without being asked to."""


class Rows:
    """One request's rows, in order.

    Args:
        handle: names the request in its session.
        abort: tells the worker to forget it.
        answers: how many answers the request has; each ends by itself.
        allowance: bytes that may wait beside MAX_PENDING_BYTES, for what is known to come in one go.
        prompt_tokens: of the request.

    What comes before anybody reads waits without a bound of its own: not the client keeps it waiting then, but the
    record of the request, which has seconds for it.

    Attributes:
        prompt_tokens: of the request.
        ends: the worker's last word on each answer that has ended, by index.
        interrupt: called when the call must end now, because who writes to a slow client may wait for ever.
    """

    def __init__(
        self,
        handle: int,
        abort: Callable[[], None],
        answers: int = 1,
        allowance: int = 0,
        prompt_tokens: int = 0,
    ) -> None:
        self.handle = handle
        self.prompt_tokens = prompt_tokens
        self.ends: dict[int, engine_pb2.End] = {}
        self.interrupt: Callable[[], None] = _nothing
        self._abort = abort
        self._received = [0] * answers
        self._max_bytes = MAX_PENDING_BYTES + allowance
        self._pending: deque[engine_pb2.Row] = deque()
        self._pending_bytes = 0
        self._is_read = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def error(self) -> Exception | None:
        """Why there will be no more rows, when that is not the worker's last word."""
        return self._error

    @property
    def ended(self) -> bool:
        """The worker has said its last word on every answer."""
        return len(self.ends) == len(self._received)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers: as the worker says where one has ended, else those received."""
        ends = self.ends
        return sum(
            ends[index].completion_tokens if index in ends else received
            for index, received in enumerate(self._received)
        )

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that were computed: as the worker says, else all where a token came of them."""
        said = max((end.prompt_tokens for end in self.ends.values()), default=0)
        return self.prompt_tokens if not self.ended and self.completion_tokens else said

    def put(self, row: engine_pb2.Row) -> None:
        """Take one row from the worker; never waits."""
        self._received[row.index] += len(row.token_ids)
        if row.HasField("end"):
            self.ends[row.index] = row.end
            if row.end.reason == engine_pb2.END_REASON_ERROR or self.ended:
                self._over.set()
        if self._error is not None:
            return
        self._pending.append(row)
        self._pending_bytes += row.ByteSize() + _ROW_BYTES
        self._changed.set()
        if self._is_read and self._pending_bytes > 2 * self._max_bytes:
            self._merge()
            if self._pending_bytes > self._max_bytes:
                self.fail(slow_client())

    def fail(self, error: Exception) -> None:
        """There will be no more rows; with a CloisterError the call ends now, else once it has what came."""
        if self._error is not None or self.ended:
            return
        self._error = error
        if isinstance(error, CloisterError):
            self._pending.clear()
            self.interrupt()
        if isinstance(error, EngineGoneError):
            self._over.set()
        self._changed.set()

    def cut_off(self, error: CloisterError) -> None:
        """End the call now, even when the worker's last word only waits for a client that reads slowly."""
        if self._error is None:
            self._error = error
            self._pending.clear()
            self._changed.set()
            self.interrupt()

    def drop(self) -> None:
        """Nobody reads any more; only the worker's last words are of interest."""
        self._error = self._error or EngineGoneError()
        self._pending.clear()
        self.interrupt = _nothing

    async def next(self) -> engine_pb2.Row:
        """The next row; when many wait, those of each answer merged into one.

        Raises:
            EngineGoneError: the worker is gone.
            CloisterError: SLOW_CLIENT, or what `fail` was called with.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        if len(self._pending) > MERGE_AFTER:
            self._merge()
        if not self._is_read:
            self._is_read = True
            self._max_bytes += self._pending_bytes
        row = self._pending.popleft()
        self._pending_bytes -= row.ByteSize() + _ROW_BYTES
        return row

    def _merge(self) -> None:
        self._pending = deque(_merged(self._pending))
        self._pending_bytes = sum(row.ByteSize() + _ROW_BYTES for row in self._pending)

    def abort(self) -> None:
        """Tell the worker to forget the request, unless it has ended."""
        if not self.ended and not isinstance(self._error, EngineGoneError):
            self._abort()

    async def over(self, limit_s: float) -> None:
        """Wait for the worker's last word, at most `limit_s` seconds; an answer that failed has spoken for all."""
        try:
            async with asyncio.timeout(limit_s):
                await self._over.wait()
        except TimeoutError:
            return


def slow_client() -> CloisterError:
    """The client did not read what it asked for."""
    return CloisterError(
        "SLOW_CLIENT",
        "the client does not read its stream; read it as it comes, or ask for less",
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )


def _merged(rows: Iterable[engine_pb2.Row]) -> Iterable[engine_pb2.Row]:
    """One row for each answer, several where one would be too large, in the order in which they first appear."""
    parts: list[list[engine_pb2.Row]] = []
    open_parts: dict[int, tuple[list[engine_pb2.Row], int]] = {}
    for row in rows:
        part, size = open_parts.get(row.index, ([], 0))
        if not part or size > _MAX_MERGED_BYTES:
            part, size = [], 0
            parts.append(part)
        part.append(row)
        open_parts[row.index] = part, size + row.ByteSize()
    return map(_joined, parts)


def _joined(its: list[engine_pb2.Row]) -> engine_pb2.Row:
    """Rows of one answer as one row."""
    joined = engine_pb2.Row(handle=its[0].handle, index=its[0].index, text="".join(row.text for row in its))
    for row in its:
        joined.token_ids.extend(row.token_ids)
        joined.logprobs.extend(row.logprobs)
        joined.prompt_logprobs.extend(row.prompt_logprobs)
    if its[-1].HasField("end"):
        joined.end.CopyFrom(its[-1].end)
    return joined


def _nothing() -> None:
    """Nobody waits."""
