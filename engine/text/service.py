"""The text service of one deployment: one call at a time, killed with its process when it takes too long.

A template or a regular expression that does not end may hold the interpreter's lock, so no thread of this
process could end it. The kernel does: timers whose signals keep their default effect. Processor time counts, so
that a busy machine ends nobody; the clock counts too, far looser, for what waits. engine-host starts the process
again.

Source: setitimer(2).
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar, assert_never

import grpc

from engine.errors import EngineError
from engine.protos import engine_pb2, engine_pb2_grpc
from engine.text.model import Prepared, TextModel
from engine.text.template import Message

CPU_LIMIT_S = 2.0
"""Seconds of processor time, of the whole process, one call may take."""

WALL_LIMIT_S = 10.0
"""Seconds by the clock one call may take."""

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Made = TypeVar("_Made")

log = logging.getLogger(__name__)


class TextService(engine_pb2_grpc.TextServiceServicer):
    """`cloister.engine.v1.TextService` for one model.

    Args:
        model: whose tokens.
    """

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")

    async def Prepare(  # noqa: N802  # the method's name in the proto
        self,
        request: engine_pb2.PrepareRequest,
        context: grpc.aio.ServicerContext[engine_pb2.PrepareRequest, engine_pb2.PrepareResponse],
    ) -> engine_pb2.PrepareResponse:
        """Token ids of the input; or INVALID_ARGUMENT with "CODE: message"."""
        prepared = await self._within_limits(context, partial(_prepare, self._model, request))
        return engine_pb2.PrepareResponse(
            token_ids=prepared.ids, type_ids=prepared.segments, truncated=prepared.truncated
        )

    async def Tokenize(  # noqa: N802
        self,
        request: engine_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[engine_pb2.TokenizeRequest, engine_pb2.TokenizeResponse],
    ) -> engine_pb2.TokenizeResponse:
        """Token ids of a text, as Prepare makes them; statuses as of Prepare."""
        make = partial(self._model.tokenize, request.text, request.add_special_tokens)
        return engine_pb2.TokenizeResponse(token_ids=await self._within_limits(context, make))

    async def Detokenize(  # noqa: N802
        self,
        request: engine_pb2.DetokenizeRequest,
        context: grpc.aio.ServicerContext[engine_pb2.DetokenizeRequest, engine_pb2.DetokenizeResponse],
    ) -> engine_pb2.DetokenizeResponse:
        """Text of token ids; statuses as of Prepare."""
        make = partial(self._model.detokenize, request.token_ids)
        return engine_pb2.DetokenizeResponse(text=await self._within_limits(context, make))

    async def _within_limits(
        self, context: grpc.aio.ServicerContext[_Request, _Response], make: Callable[[], _Made]
    ) -> _Made:
        """What `make` makes, or the call's end with "CODE: message"; the process's end when it takes too long."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, _timed, make)
        except EngineError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def _timed(make: Callable[[], _Made]) -> _Made:
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)
    try:
        return make()
    except MemoryError:
        raise EngineError("TEXT_TOO_COSTLY", "preparing this input takes more memory than is allowed") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _prepare(model: TextModel, request: engine_pb2.PrepareRequest) -> Prepared:
    """A prompt leaves room for an answer; what gets a vector or a score needs none, and may be cut."""
    kind, generates = request.WhichOneof("input"), request.task == engine_pb2.TASK_GENERATE
    match kind:
        case "text":
            if generates:
                return Prepared(model.from_text(request.text))
            return model.from_input(request.text, None, request.truncate)
        case "token_ids":
            if generates:
                return Prepared(model.from_ids(request.token_ids.ids))
            return model.from_input_ids(request.token_ids.ids, request.truncate)
        case "conversation":
            messages = [Message(m.role, m.content) for m in request.conversation.messages]
            return Prepared(model.from_conversation(messages))
        case "pair":
            return model.from_input(request.pair.query, request.pair.document, request.truncate)
        case None:
            raise EngineError("EMPTY_PROMPT", "the request has no input")
        case _:
            assert_never(kind)
