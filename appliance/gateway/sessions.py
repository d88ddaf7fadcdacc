"""One long-lived Session per engine-worker: requests and aborts up, one frame per engine step down.

A session that broke is not mended: its requests fail, and the next request opens a new one. One that the worker
closes in order, because it drains, breaks too, but is not held against what was in it.
"""

import asyncio
import logging
from contextlib import suppress
from itertools import count
from pathlib import Path

import grpc

from appliance.gateway.quarantine import Passage
from appliance.gateway.rows import EngineGoneError, Rows
from appliance.gateway.texts import engine_unavailable
from appliance.gateway.unix import open_channel
from engine.protos import engine_pb2, engine_pb2_grpc

# Seconds a new request waits for a worker that is not connected; the channel backs off from 50 to 500 ms within.
CONNECT_S = 2.0
# Requests that nobody reads any more and that the worker has not ended yet; beyond them the oldest is forgotten.
_MOST_GIVEN_UP = 4096
# Bytes that a prompt's log probabilities may wait in, for one request, and what one of them takes.
_MAX_ALLOWANCE = 4 << 20
_LOGPROB_BYTES = 16

_ANSWERED = (engine_pb2.END_REASON_STOP, engine_pb2.END_REASON_LENGTH)

log = logging.getLogger(__name__)


class Session:
    """A live stream to one worker.

    Attributes:
        broken: the stream ended; no request can be submitted any more.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.broken = False
        self._channel = channel
        self._call = engine_pb2_grpc.WorkerServiceStub(channel).Session()
        self._handles = count(1)
        self._rows: dict[int, Rows] = {}
        self._given_up: dict[int, Rows] = {}
        self._passages: dict[int, Passage] = {}
        self._unsent: set[int] = set()
        self._commands: asyncio.Queue[engine_pb2.SessionRequest] = asyncio.Queue()
        self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))

    @property
    def num_running(self) -> int:
        """Requests that have not ended and have a reader."""
        return len(self._rows)

    def submit(self, request: engine_pb2.Submit, passage: Passage) -> Rows:
        """Send a request up, its handle filled in; its rows come back through the answer.

        From here on the session answers for the passage: it ends when the worker has ended the request or is gone.
        """
        handle = next(self._handles)
        request.handle = handle
        rows = Rows(
            handle, lambda: self._abort(handle), request.n or 1, _allowance(request), len(request.token_ids)
        )
        if self.broken:
            passage.left()
            rows.fail(EngineGoneError())
            return rows
        self._rows[handle] = rows
        self._passages[handle] = passage
        self._unsent.add(handle)
        self._commands.put_nowait(engine_pb2.SessionRequest(submit=request))
        return rows

    def release(self, rows: Rows) -> None:
        """Nobody reads a request's rows any more; who releases one that has not ended has aborted it."""
        if self._rows.pop(rows.handle, None) is None:
            return
        rows.drop()
        self._given_up[rows.handle] = rows
        if len(self._given_up) > _MOST_GIVEN_UP:
            oldest = next(iter(self._given_up))
            del self._given_up[oldest]
            self._passages.pop(oldest).left()

    def fail_all(self, error: Exception) -> None:
        """End every request of this session with `error`."""
        for rows in list(self._rows.values()):
            rows.fail(error)

    async def close(self) -> None:
        """End the stream; the worker aborts what it still has of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._break()
        await self._channel.close()

    def _abort(self, handle: int) -> None:
        if not self.broken:
            self._commands.put_nowait(engine_pb2.SessionRequest(abort=engine_pb2.Abort(handle=handle)))

    async def _read(self) -> None:
        died = False
        try:
            async for frame in self._call:
                self._dispatch(frame)
            log.info("worker closed the session")
        except IndexError:
            log.error("session dropped: the worker sent a row of an answer that nobody asked for")
        except grpc.aio.AioRpcError as error:
            died = True
            log.warning("session broke", extra={"status": error.code().name})
        finally:
            self._break(died)

    def _dispatch(self, frame: engine_pb2.SessionResponse) -> None:
        """Hand the rows of one engine step to their requests; a row without a request is of a forgotten one."""
        for row in frame.rows:
            rows = self._rows.get(row.handle) or self._given_up.get(row.handle)
            if rows is None:
                continue
            rows.put(row)
            self._passages[row.handle].answered()
            if row.HasField("end") and rows.ended:
                self._ended(rows)

    def _ended(self, rows: Rows) -> None:
        """The worker is done with a request: one that it answered to the end did not kill it."""
        self._rows.pop(rows.handle, None)
        self._given_up.pop(rows.handle, None)
        passage = self._passages.pop(rows.handle)
        if all(end.reason in _ANSWERED for end in rows.ends.values()):
            passage.survived()
        else:
            passage.left()

    async def _write(self) -> None:
        """Send commands until the stream ends; `_read` learns why it did."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                command = await self._commands.get()
                await self._call.write(command)
                self._unsent.discard(command.submit.handle)

    def _break(self, died: bool = False) -> None:
        """End everything; a worker that died is held against what had been written to it, and nothing else."""
        self.broken = True
        if died:
            Passage.died(passage for handle, passage in self._passages.items() if handle not in self._unsent)
        for passage in self._passages.values():
            passage.left()
        self._passages.clear()
        self._unsent.clear()
        self.fail_all(EngineGoneError())
        self._rows.clear()
        self._given_up.clear()
        self._call.cancel()


class Sessions:
    """The sessions of this gateway, one for each worker's socket."""

    def __init__(self) -> None:
        self._live: dict[str, Session] = {}
        self._opening: dict[str, asyncio.Task[Session]] = {}

    async def open(self, socket: str) -> Session:
        """The live session to the worker at `socket`, made when there is none.

        Raises:
            CloisterError: ENGINE_UNAVAILABLE.
        """
        session = self._live.get(socket)
        if session is not None and not session.broken:
            return session
        if socket not in self._opening:
            task = self._opening[socket] = asyncio.create_task(self._connect(socket))
            task.add_done_callback(lambda done: self._opened(socket, done))
        return await asyncio.shield(self._opening[socket])

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`."""
        for session in self._live.values():
            session.fail_all(error)

    async def close(self) -> None:
        """End every session."""
        for session in self._live.values():
            await session.close()

    async def _connect(self, socket: str) -> Session:
        broken = self._live.pop(socket, None)
        if broken is not None:
            await broken.close()
        channel = open_channel(Path(socket))
        try:
            async with asyncio.timeout(CONNECT_S):
                await channel.channel_ready()
        except TimeoutError:
            await channel.close()
            raise engine_unavailable() from None
        log.info("session opened", extra={"socket": Path(socket).name})
        session = self._live[socket] = Session(channel)
        return session

    def _opened(self, socket: str, done: asyncio.Task[Session]) -> None:
        """Forget the attempt, and read its error, which nobody may be waiting for any more."""
        self._opening.pop(socket, None)
        if not done.cancelled():
            done.exception()


def _allowance(request: engine_pb2.Submit) -> int:
    """Bytes that may wait for a client because they come all at once, before it was told `Accepted`."""
    if not request.HasField("prompt_logprobs"):
        return 0
    return min(len(request.token_ids) * (2 + request.prompt_logprobs) * _LOGPROB_BYTES, _MAX_ALLOWANCE)
