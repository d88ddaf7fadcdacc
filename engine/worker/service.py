"""The worker's service: sessions of gateways over one engine."""

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple

import grpc

from engine.errors import EngineError
from engine.loop import StepRow
from engine.protos import engine_pb2, engine_pb2_grpc
from engine.worker.engine_thread import EngineThread
from engine.worker.outbox import MAX_PENDING_BYTES, Outbox
from engine.worker.translate import count_answers, failed_row, to_requests, to_row

log = logging.getLogger(__name__)


_SessionContext = grpc.aio.ServicerContext[engine_pb2.SessionRequest, engine_pb2.SessionResponse]


class _Session:
    """One gateway's stream: its unread rows, and its running answers by its own handles."""

    def __init__(self, max_pending_bytes: int) -> None:
        self.outbox = Outbox(max_pending_bytes)
        self.running: dict[int, dict[int, int]] = {}  # session's handle -> index of an answer -> engine's handle


class _Route(NamedTuple):
    """Whose answer an engine-wide handle is."""

    session: _Session
    handle: int
    answer: int


class WorkerService(engine_pb2_grpc.WorkerServiceServicer):
    """`cloister.engine.v1.WorkerService` over one engine.

    Handles are a session's own; the engine sees numbers of this service, so that sessions cannot meet. Each of the
    n answers of a Submit is a request of its own to the engine, and gets exactly one end.

    Args:
        engine: built.
        backend: name of the backend in use.
        max_pending_bytes: bytes a session may leave unread before its requests are aborted.
    """

    def __init__(self, engine: EngineThread, backend: str, max_pending_bytes: int = MAX_PENDING_BYTES) -> None:
        self._engine = engine
        self._backend = backend
        self._max_pending_bytes = max_pending_bytes
        self._routes: dict[int, _Route] = {}
        self._numbers = itertools.count(1)
        self._sessions: set[_Session] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        loop = asyncio.get_running_loop()
        engine.deliver_to(lambda step, rows: _call_soon(loop, self._deliver, step, rows))

    async def Session(  # noqa: N802  # the method's name in the proto
        self, request_iterator: AsyncIterator[engine_pb2.SessionRequest], context: _SessionContext
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        """Requests and aborts up, one frame per step down; the end of the stream aborts its requests."""
        session = _Session(self._max_pending_bytes)
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            while (frame := await session.outbox.take()) is not None:
                yield frame
        finally:
            reader.cancel()
            self._sessions.discard(session)
            self._abort_all(session)

    async def GetStatus(  # noqa: N802
        self,
        request: engine_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[engine_pb2.GetStatusRequest, engine_pb2.GetStatusResponse],
    ) -> engine_pb2.GetStatusResponse:
        """Counters of the scheduler and the KV pool after the last step."""
        return engine_pb2.GetStatusResponse(**self._engine.status()._asdict(), backend=self._backend)

    async def drain(self, grace_s: float) -> None:
        """Take nothing new; return when nothing runs, or after `grace_s` seconds.

        The sessions end in order, which tells a gateway that this worker has not died over what it still had.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        for session in self._sessions:
            session.outbox.close()

    async def _read(self, session: _Session, commands: AsyncIterator[engine_pb2.SessionRequest]) -> None:
        """Carry out a session's commands until it sends no more; they wait while it has too much to read."""
        try:
            async for command in commands:
                await session.outbox.room()
                self._obey(session, command)
        finally:
            session.outbox.close()

    def _obey(self, session: _Session, command: engine_pb2.SessionRequest) -> None:
        if command.HasField("submit"):
            self._take(session, command.submit)
        elif command.HasField("abort"):
            for number in session.running.get(command.abort.handle, {}).values():
                self._engine.abort(number)

    def _take(self, session: _Session, submit: engine_pb2.Submit) -> None:
        """Hand a request's answers to the engine; a refusal ends each, and what still ran under the handle."""
        answers: Iterable[int] = range(count_answers(submit))
        try:
            if submit.handle in session.running:
                answers = self._forget(session, submit.handle)
                raise EngineError("DUPLICATE_HANDLE", "a request under this handle was running; both end here")
            self._submit(session, submit)
        except EngineError as error:
            self._push(session, self._engine.status().steps, _failed(submit.handle, answers, error))

    def _submit(self, session: _Session, submit: engine_pb2.Submit) -> None:
        """Hand a request's answers to the engine.

        Raises:
            EngineError: it cannot be taken as it is.
        """
        if self._draining:
            raise EngineError("WORKER_DRAINING", "this worker is being stopped and takes nothing new")
        numbers = [next(self._numbers) for _ in range(count_answers(submit))]
        for index, request in enumerate(to_requests(numbers, submit)):
            self._engine.submit(request)
            self._routes[request.handle] = _Route(session, submit.handle, index)
        session.running[submit.handle] = dict(enumerate(numbers))
        self._idle.clear()

    def _forget(self, session: _Session, handle: int) -> list[int]:
        """Abort a request of which no further row is wanted; the answers that had not ended."""
        answers = session.running.pop(handle)
        for number in answers.values():
            del self._routes[number]
            self._engine.abort(number)
        self._note_idle()
        return list(answers)

    def _abort_all(self, session: _Session) -> None:
        for handle in list(session.running):
            self._forget(session, handle)

    def _deliver(self, step: int, rows: list[StepRow]) -> None:
        """Sort one step's rows by session; on the event loop."""
        by_session: dict[_Session, list[engine_pb2.Row]] = defaultdict(list)
        for row in rows:
            route = self._routes.get(row.handle)
            if route is None:
                continue  # its session is gone or has forgotten it
            by_session[route.session].append(to_row(route.handle, route.answer, row))
            if row.end is not None:
                self._end(row.handle, route)
        for session, messages in by_session.items():
            self._push(session, step, messages)
        self._note_idle()

    def _end(self, number: int, route: _Route) -> None:
        """Forget an answer that has ended, and its request when it was the last one."""
        del self._routes[number]
        answers = route.session.running[route.handle]
        del answers[route.answer]
        if not answers:
            del route.session.running[route.handle]

    def _push(self, session: _Session, step: int, rows: list[engine_pb2.Row]) -> None:
        """Leave rows for the session to read; one that reads nothing loses its requests."""
        if session.outbox.push(step, rows):
            return
        log.warning("session overflow", extra={"running": len(session.running)})
        error = EngineError("SESSION_OVERFLOW", "the session left too much unread")
        ended = [row for handle, answers in session.running.items() for row in _failed(handle, answers, error)]
        self._abort_all(session)
        session.outbox.push(step, ended)

    def _note_idle(self) -> None:
        if not self._routes:
            self._idle.set()


def _failed(handle: int, answers: Iterable[int], error: EngineError) -> list[engine_pb2.Row]:
    """The last rows of answers that the engine never took, or that nobody waits for any more."""
    return [to_row(handle, index, failed_row(handle, error)) for index in answers]


def _call_soon(
    loop: asyncio.AbstractEventLoop, deliver: Callable[[int, list[StepRow]], None], step: int, rows: list[StepRow]
) -> None:
    """Carry a step's rows to the event loop; nobody reads them once it is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(deliver, step, rows)
