"""One request's rows, between the worker's frames and a client that may be slow: bounded, merged, then cut off."""

import asyncio
from collections import deque
from collections.abc import Callable

import grpc

from appliance.errors import CloisterError
from engine.protos import engine_pb2

# A client that keeps up gets one message per step. Behind by more than this many steps, it gets them merged.
MERGE_AFTER = 32
# Behind by more than this, it is cut off. A row counts with what Python needs to keep it.
MAX_PENDING_BYTES = 256 << 10
_ROW_BYTES = 256


class EngineGoneError(Exception):
    """The worker died, or ended the request without being asked to."""


class Rows:
    """One request's rows, in order.

    Attributes:
        handle: names the request in its session.
        completion_tokens: tokens received so far.
        end: the worker's last word on the request, once it came.
        interrupt: called when the call must end now, because who writes to a slow client may wait for ever.
    """

    def __init__(self, handle: int, abort: Callable[[], None]) -> None:
        self.handle = handle
        self.completion_tokens = 0
        self.end: engine_pb2.End | None = None
        self.interrupt: Callable[[], None] = _nothing
        self._abort = abort
        self._pending: deque[engine_pb2.Row] = deque()
        self._pending_bytes = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def error(self) -> Exception | None:
        """Why there will be no more rows, when that is not the worker's `end`."""
        return self._error

    def put(self, row: engine_pb2.Row) -> None:
        """Take one row from the worker; never waits."""
        self.completion_tokens += len(row.token_ids)
        if row.HasField("end"):
            self.end = row.end
            self._over.set()
        if self._error is not None:
            return
        self._pending.append(row)
        self._pending_bytes += row.ByteSize() + _ROW_BYTES
        self._changed.set()
        if self._pending_bytes > MAX_PENDING_BYTES:
            self.fail(slow_client())

    def fail(self, error: Exception) -> None:
        """There will be no more rows; with a CloisterError the call ends now, else once it has what came."""
        if self._error is not None or self.end is not None:
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

    async def next(self) -> engine_pb2.Row:
        """The next row, or all that wait merged into one when there are many.

        Raises:
            EngineGoneError: the worker is gone.
            CloisterError: SLOW_CLIENT, or what `fail` was called with.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        if len(self._pending) <= MERGE_AFTER:
            row = self._pending.popleft()
            self._pending_bytes -= row.ByteSize() + _ROW_BYTES
            return row
        row = _merged(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        return row

    def abort(self) -> None:
        """Tell the worker to forget the request, unless it has ended."""
        if not self._over.is_set():
            self._abort()

    async def over(self, limit_s: float) -> None:
        """Wait for the worker's last word, at most `limit_s` seconds."""
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


def _merged(rows: deque[engine_pb2.Row]) -> engine_pb2.Row:
    merged = engine_pb2.Row(handle=rows[0].handle, text="".join(row.text for row in rows))
    for row in rows:
        merged.token_ids.extend(row.token_ids)
    if rows[-1].HasField("end"):
        merged.end.CopyFrom(rows[-1].end)
    return merged


def _nothing() -> None:
    """Nobody waits."""
