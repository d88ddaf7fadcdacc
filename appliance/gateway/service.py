"""cloister.inference.v1.InferenceService: each call identified, checked, walked, and its refusal recorded."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from appliance.errors import CloisterError, abort
from appliance.gateway.batches import check_embed, check_rerank
from appliance.gateway.control import ControlRefusalError
from appliance.gateway.gate import PUSHBACK_TRAILER, pushback
from appliance.gateway.gathering import Embedding, Ranking
from appliance.gateway.generation import Event, Generation
from appliance.gateway.identity import caller_of, check_caller
from appliance.gateway.neighbours import Neighbours
from appliance.gateway.refusals import Refusals
from appliance.gateway.tokens import Tokens
from appliance.gateway.validation import CheckedPrompt, check_chat, check_generate, check_size, request_id_of
from appliance.gateway.walk import Walk
from appliance.protos import control_pb2, inference_pb2_grpc
from appliance.protos import inference_pb2 as api

SERVICE = "cloister.inference.v1.InferenceService"
RECEIPT_TRAILER = "cloister-receipt-bin"
_Context = grpc.aio.ServicerContext[Any, Any]
Request = api.GenerateRequest | api.ChatRequest | api.EmbedRequest | api.RerankRequest
OneWalk = TypeVar("OneWalk", bound=Walk)
Begin = Callable[[control_pb2.Caller, float], OneWalk]  # the request checked, for a caller and until a deadline
Question = TypeVar("Question", bound=Message)
Answer = TypeVar("Answer", bound=Message)

log = logging.getLogger(__name__)


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """What tenants call.

    Attributes:
        draining: new calls are refused.
    """

    def __init__(self, neighbours: Neighbours, refusals: Refusals) -> None:
        self.draining = False
        self._refusals = refusals
        self._neighbours = neighbours
        self._tokens = Tokens(neighbours)
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(  # type: ignore[override]  # noqa: N802  # writes through the context: see _answer
        self, request: api.GenerateRequest, context: _Context
    ) -> None:
        """Text from a prompt."""
        await self._generate("Generate", request, context, lambda: check_generate(request), _as_generate(context))

    async def Chat(  # type: ignore[override]  # noqa: N802  # writes through the context: see _answer
        self, request: api.ChatRequest, context: _Context
    ) -> None:
        """Text from a conversation."""
        await self._generate("Chat", request, context, lambda: check_chat(request), _as_chat(context))

    async def Embed(self, request: api.EmbedRequest, context: _Context) -> api.EmbedResponse:  # noqa: N802
        """A vector of each input."""
        method = f"/{SERVICE}/Embed"

        def begin(caller: control_pb2.Caller, deadline: float) -> Embedding:
            return Embedding(self._neighbours, caller, method, check_embed(request), deadline)

        return (await self._answer(method, request, context, begin)).response

    async def Rerank(self, request: api.RerankRequest, context: _Context) -> api.RerankResponse:  # noqa: N802
        """Documents by how well they answer a query."""
        method = f"/{SERVICE}/Rerank"

        def begin(caller: control_pb2.Caller, deadline: float) -> Ranking:
            return Ranking(self._neighbours, caller, method, check_rerank(request), deadline)

        return (await self._answer(method, request, context, begin)).response

    async def Tokenize(  # noqa: N802
        self, request: api.TokenizeRequest, context: _Context
    ) -> api.TokenizeResponse:
        """Tokens of a text."""
        return await self._ask(f"/{SERVICE}/Tokenize", request, context, self._tokens.tokenize)

    async def Detokenize(  # noqa: N802
        self, request: api.DetokenizeRequest, context: _Context
    ) -> api.DetokenizeResponse:
        """Text of tokens."""
        return await self._ask(f"/{SERVICE}/Detokenize", request, context, self._tokens.detokenize)

    async def ListModels(  # noqa: N802
        self, request: api.ListModelsRequest, context: _Context
    ) -> api.ListModelsResponse:
        """The models of the calling tenant."""
        return await self._ask(f"/{SERVICE}/ListModels", request, context, self._list_models)

    async def _list_models(
        self, caller: control_pb2.Caller, method: str, _: api.ListModelsRequest
    ) -> api.ListModelsResponse:
        visible = await self._neighbours.control.visible_models(caller, method)
        return api.ListModelsResponse(
            models=[
                api.Model(
                    name=model.name,
                    model_digest=model.model_digest,
                    max_context_tokens=model.max_context_tokens,
                    capabilities=model.capabilities,
                    ready=model.ready,
                )
                for model in visible.models
            ]
        )

    async def _ask(
        self,
        method: str,
        request: Question,
        context: _Context,
        answer: Callable[[control_pb2.Caller, str, Question], Awaitable[Answer]],
    ) -> Answer:
        """Answer one unary call, or end it with its error."""
        caller = caller_of(context)
        self._enter()
        try:
            self._check_open()
            check_caller(caller, context)
            check_size(request, self._neighbours.limits.max_request_bytes)
            return await answer(caller, method, request)
        except CloisterError as error:
            refusal = error
            await self._record(refusal, caller, method, "")
        finally:
            self._leave()
        return await abort(context, refusal, pushback(refusal))

    async def wait_idle(self, limit_s: float) -> bool:
        """Wait until no call is being answered, at most `limit_s` seconds; whether it came to that."""
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _generate(
        self,
        name: str,
        request: api.GenerateRequest | api.ChatRequest,
        context: _Context,
        check: Callable[[], CheckedPrompt],
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        """Answer one streaming call, or end it with its error.

        Events are written through the context: a generator's call that is cancelled is not told so by
        CancelledError, and its lease would be settled late.
        """
        method = f"/{SERVICE}/{name}"

        def begin(caller: control_pb2.Caller, deadline: float) -> Generation:
            return Generation(self._neighbours, caller, method, check(), deadline, send)

        await self._answer(method, request, context, begin)

    async def _answer(self, method: str, request: Request, context: _Context, begin: Begin[OneWalk]) -> OneWalk:
        """Walk one request to its end, its receipt in the trailers, or end the call with its error."""
        started = time.monotonic()
        self._enter()
        try:
            walk, receipt = await self._walk(method, request, context, begin)
        except _EndedError as ended:
            _log(method, ended.request_id, ended.cause.code, started)
            failure = ended
        else:
            _log(method, receipt.request_id, "OK", started)
            context.set_trailing_metadata(((RECEIPT_TRAILER, receipt.SerializeToString()),))
            return walk
        finally:
            self._leave()
        return await abort(context, failure.cause, failure.trailers)

    async def _walk(
        self, method: str, request: Request, context: _Context, begin: Begin[OneWalk]
    ) -> tuple[OneWalk, api.Receipt]:
        caller, walk = caller_of(context), None
        limits = self._neighbours.limits
        try:
            self._check_open()
            check_caller(caller, context)
            check_size(request, limits.max_request_bytes)
            walk = begin(caller, _deadline(context, limits.default_deadline_seconds))
            return walk, await walk.run()
        except CloisterError as error:
            request_id = walk.request_id if walk is not None else _known_id(request.request_id)
            if walk is not None and walk.admitted:
                raise _EndedError(error, request_id, ((PUSHBACK_TRAILER, "-1"),)) from None
            await self._record(error, caller, method, request_id)
            raise _EndedError(error, request_id, pushback(error)) from None

    async def _record(
        self, error: CloisterError, caller: control_pb2.Caller, method: str, request_id: str
    ) -> None:
        """Put a refusal of our own on record; control records its own, and one that is gone records nothing."""
        if not isinstance(error, ControlRefusalError) and error.code != "CONTROL_UNAVAILABLE":
            await self._refusals.record(caller, method, request_id, error.code)

    def _check_open(self) -> None:
        """Refuse what comes too late, or on top of too much."""
        if self.draining:
            raise CloisterError(
                "DRAINING", "the gateway is about to stop; try again", grpc.StatusCode.UNAVAILABLE,
                retry_after=timedelta(seconds=1),
            )  # fmt: skip
        most = self._neighbours.limits.max_streams
        if self._active > most:
            raise CloisterError(
                "GATEWAY_BUSY", f"{most} requests are being answered; try again",
                grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=timedelta(seconds=1),
            )  # fmt: skip

    def _enter(self) -> None:
        self._active += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._active -= 1
        if self._active == 0:
            self._idle.set()


class _EndedError(Exception):
    """A call's error, and the trailers that go with it."""

    def __init__(self, cause: CloisterError, request_id: str, trailers: tuple[tuple[str, str], ...]) -> None:
        super().__init__(cause.code)
        self.cause = cause
        self.request_id = request_id
        self.trailers = trailers


def _as_generate(context: _Context) -> Callable[[Event], Awaitable[None]]:
    def send(event: Event) -> Awaitable[None]:
        response = api.GenerateResponse()
        _place(response, event)
        return context.write(response)

    return send


def _as_chat(context: _Context) -> Callable[[Event], Awaitable[None]]:
    def send(event: Event) -> Awaitable[None]:
        response = api.ChatResponse()
        _place(response, event)
        return context.write(response)

    return send


def _place(response: api.GenerateResponse | api.ChatResponse, event: Event) -> None:
    """Put the event into the arm of its type; a Delta is by far the most frequent."""
    match event:
        case api.Delta():
            response.delta.CopyFrom(event)
        case api.Accepted():
            response.accepted.CopyFrom(event)
        case api.Finished():
            response.finished.CopyFrom(event)
        case api.Completed():
            response.completed.CopyFrom(event)


def _deadline(context: _Context, default_s: float) -> float:
    """On the event loop's clock: the client's, or `default_s` seconds from now."""
    remaining: float | None = context.time_remaining()
    return asyncio.get_running_loop().time() + (default_s if remaining is None else remaining)


def _known_id(given: str) -> str:
    """The request's id if it is one."""
    try:
        return request_id_of(given) if given else ""
    except CloisterError:
        return ""


def _log(method: str, request_id: str, code: str, started: float) -> None:
    facts = {"method": method.rpartition("/")[2], "request_id": request_id, "code": code}
    log.info("answered", extra={**facts, "ms": round((time.monotonic() - started) * 1000, 1)})
