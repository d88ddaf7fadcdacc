"""The error: what one side raises is what the other side, ours or Google's, reads."""

from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from appliance.errors import CloisterError, abort, from_rpc_error

REFUSAL = CloisterError(
    "CONTEXT_OVERFLOW",
    "the prompt has 900 tokens; shorten it to 512",
    grpc.StatusCode.INVALID_ARGUMENT,
    metadata={"max_context_tokens": "512"},
    field="text",
    retry_after=timedelta(seconds=1.5),
)
METHOD = "/test.Service/Refuse"


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """A server that refuses everything with REFUSAL, except on the path that has no details."""

    async def refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if request == b"bare":
            await context.abort(grpc.StatusCode.INTERNAL, "no details")
        await abort(context, REFUSAL, (("receipt-bin", b"\x01"),))

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Refuse": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def call(address: str, request: bytes) -> grpc.RpcError:
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as error:
            await channel.unary_unary(METHOD)(request)
        return error.value


async def test_an_error_arrives_as_it_was_raised(address: str) -> None:
    error = from_rpc_error(await call(address, b""))
    assert (error.code, error.message, error.status) == (REFUSAL.code, REFUSAL.message, REFUSAL.status)
    assert (error.metadata, error.field, error.retry_after) == (
        REFUSAL.metadata,
        REFUSAL.field,
        REFUSAL.retry_after,
    )


async def test_a_call_without_our_details_keeps_its_status(address: str) -> None:
    error = from_rpc_error(await call(address, b"bare"))
    assert (error.code, error.message, error.status) == ("INTERNAL", "no details", grpc.StatusCode.INTERNAL)


def test_googles_own_decoder_reads_our_details() -> None:
    class Call:
        def code(self) -> grpc.StatusCode:
            return REFUSAL.status

        def details(self) -> str:
            return str(REFUSAL)

        def trailing_metadata(self) -> object:
            return REFUSAL.trailers()

    status = rpc_status.from_call(Call())  # type: ignore[arg-type]  # the three methods it reads
    assert status is not None
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail, message in zip(status.details, (info, bad, retry), strict=True):
        assert detail.Unpack(message)
    assert (info.reason, info.domain, info.metadata["max_context_tokens"]) == (REFUSAL.code, "cloister", "512")
    assert bad.field_violations[0].field == "text"
    assert retry.retry_delay.ToTimedelta() == REFUSAL.retry_after


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b""])
async def test_garbage_in_the_details_is_not_an_exception(garbage: bytes) -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNKNOWN,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", garbage)),
        "odd",
    )
    assert from_rpc_error(error).message == "odd"
    assert from_rpc_error(error).status is grpc.StatusCode.UNKNOWN
