"""One long-lived Session per engine-worker: requests and aborts up, one frame per engine step down.

A session that broke is not mended: its requests fail, and the next request opens a new one.
"""

import asyncio
import logging
from itertools import count
from pathlib import Path

import grpc

from appliance.gateway.rows import EngineGoneError, Rows
from appliance.gateway.texts import engine_unavailable
from appliance.gateway.unix import open_channel
from engine.protos import engine_pb2, engine_pb2_grpc

# Seconds a new request waits for a worker that is not connected; the channel backs off from 50 to 500 ms within.
CONNECT_S = 2.0

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
        self._commands: asyncio.Queue[engine_pb2.SessionRequest] = asyncio.Queue()
        self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return len(self._rows)

    def submit(self, request: engine_pb2.Submit) -> Rows:
        """Send a request up, its handle filled in; its rows come back through the answer."""
        handle = next(self._handles)
        request.handle = handle
        rows = Rows(handle, lambda: self._abort(handle))
        if self.broken:
            rows.fail(EngineGoneError())
            return rows
        self._rows[handle] = rows
        self._commands.put_nowait(engine_pb2.SessionRequest(submit=request))
        return rows

    def release(self, rows: Rows) -> None:
        """Take no more rows for a request; who releases one that has not ended has aborted it."""
        self._rows.pop(rows.handle, None)

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
        try:
            async for frame in self._call:
                self._dispatch(frame)
            log.info("worker closed the session")
        except grpc.aio.AioRpcError as error:
            log.warning("session broke", extra={"status": error.code().name})
        finally:
            self._break()

    def _dispatch(self, frame: engine_pb2.SessionResponse) -> None:
        """Hand the rows of one engine step to their requests; a row without a request is of an aborted one."""
        for row in frame.rows:
            rows = self._rows.get(row.handle)
            if rows is None:
                continue
            rows.put(row)
            if row.HasField("end"):
                del self._rows[row.handle]

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._commands.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._break()

    def _break(self) -> None:
        self.broken = True
        self.fail_all(EngineGoneError())
        self._rows.clear()
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
