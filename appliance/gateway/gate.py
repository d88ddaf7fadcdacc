"""What every call passes before its service sees it: the policy row, its certificate's share, its message in time.

Each method is served to gRPC as one that streams its request as raw bytes. That hands the call over before its
message has come, so that calls which never send one are counted and bounded, and malformed bytes are refused here,
with our code, instead of by gRPC.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from appliance import policy
from appliance.errors import CloisterError, abort
from appliance.gateway.identity import caller_of
from appliance.gateway.limits import Limits
from appliance.gateway.refusals import Refusals
from appliance.policy import Audience

# Open at once by one certificate, among its calls.
MAX_WATCHES = 4
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
_WATCH = "/grpc.health.v1.Health/Watch"
_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Any  # an RpcMethodHandler; the types of grpc know none whose functions are asynchronous


class Gate(grpc.aio.ServerInterceptor):
    """Wraps every method.

    Args:
        refusals: where what is refused here is recorded.
        limits: how much one certificate may have open, and how long a request may take to come.
    """

    def __init__(self, refusals: Refusals, limits: Limits) -> None:
        self._refusals = refusals
        self._limits = limits
        self._open: Counter[tuple[bytes, bool]] = Counter()
        self._reading: set[asyncio.Task[Any]] = set()

    @property
    def num_open(self) -> int:
        """Calls being answered, of all certificates."""
        return sum(count for (_, watch), count in self._open.items() if not watch)

    @property
    def num_reading(self) -> int:
        """Calls whose message is being waited for."""
        return len(self._reading)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """The handler that passes the call on, or refuses it."""
        method = str(handler_call_details.method)
        handler = await continuation(handler_call_details)
        unary = handler is not None and not handler.response_streaming

        async def serve(_: object, context: _Context) -> Any:
            try:
                return await self._serve(method, handler, context)
            except CloisterError as error:
                refusal = error
            await self._refusals.record(caller_of(context), method, "", refusal.code)
            return await abort(context, refusal, pushback(refusal))

        serializer = handler.response_serializer if handler is not None else None
        if unary:
            return grpc.stream_unary_rpc_method_handler(serve, None, serializer)
        return grpc.stream_stream_rpc_method_handler(serve, None, serializer)

    async def _serve(self, method: str, handler: _Handler | None, context: _Context) -> Any:
        if handler is None:
            raise CloisterError(
                "METHOD_UNKNOWN", "the appliance has no such method", grpc.StatusCode.UNIMPLEMENTED
            )
        policy.rule_for(method, Audience.TENANT, Audience.PUBLIC)
        with self._counted(caller_of(context).certificate_sha256, method == _WATCH):
            request = await self._request(handler, context)
            return await (handler.unary_stream or handler.unary_unary)(request, context)

    @contextmanager
    def _counted(self, certificate: bytes, watch: bool) -> Iterator[None]:
        """Count one open call of a certificate.

        Raises:
            CloisterError: TOO_MANY_CALLS.
        """
        keys = ((certificate, False), (certificate, True)) if watch else ((certificate, False),)
        most = self._limits.max_calls_per_certificate
        limit = MAX_WATCHES if watch else most
        if self._open[keys[0]] >= most or self._open[keys[-1]] >= limit:
            raise _too_many(limit, "health watches" if watch else "calls")
        self._open.update(keys)
        try:
            yield
        finally:
            self._open.subtract(keys)
            for key in keys:
                if not self._open[key]:
                    del self._open[key]

    async def _request(self, handler: _Handler, context: _Context) -> Any:
        """The request, parsed.

        Raises:
            CloisterError: REQUEST_LATE or MALFORMED_REQUEST.
        """
        # Never cancelled, because gRPC would write into what was freed; it ends with the call.
        reading = asyncio.create_task(_read(context))
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        await asyncio.wait((reading,), timeout=self._limits.request_seconds)
        if not reading.done():
            raise CloisterError(
                "REQUEST_LATE",
                f"the request was not complete {self._limits.request_seconds:g} s after its call began; "
                "send it at once",
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        message = reading.result()
        if not isinstance(message, bytes):
            raise _malformed()
        try:
            return handler.request_deserializer(message)
        except DecodeError:
            raise _malformed() from None


def pushback(error: CloisterError) -> tuple[tuple[str, str], ...]:
    """When a client that retries by itself should, or that it should not (gRPC A6).

    What is not available now may be so soon, whether or not it is said when; any other refusal without a delay is
    the same the next time.
    """
    if error.retry_after is None:
        return () if error.status is grpc.StatusCode.UNAVAILABLE else ((PUSHBACK_TRAILER, "-1"),)
    return ((PUSHBACK_TRAILER, str(round(error.retry_after.total_seconds() * 1000))),)


async def _read(context: _Context) -> Any:
    """The call's message; EOF when it has none, or is over."""
    try:
        return await context.read()
    except (asyncio.InvalidStateError, grpc.aio.BaseError):
        return grpc.aio.EOF


def _too_many(limit: int, what: str) -> CloisterError:
    return CloisterError(
        "TOO_MANY_CALLS",
        f"this certificate already has {limit} {what} open; end one first",
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        {"max_open": str(limit)},
        retry_after=timedelta(seconds=1),
    )


def _malformed() -> CloisterError:
    return CloisterError(
        "MALFORMED_REQUEST", "the request is not one message of the method's type; see the service's proto"
    )
