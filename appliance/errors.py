"""The one error of the appliance: a stable code, what was wrong, where, and what to do, on the wire and off it.

On the wire it is a google.rpc.Status with an ErrorInfo (domain "cloister", reason = the code) in the trailer
`grpc-status-details-bin`, and BadRequest and RetryInfo where they apply; any client with the googleapis types
reads it. Needs only grpcio and protobuf.

Source: google/rpc/status.proto and error_details.proto; AIP-193.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from appliance.protos import status_pb2

DOMAIN = "cloister"
DETAILS_TRAILER = "grpc-status-details-bin"
_TYPE_URL = "type.googleapis.com/google.rpc."


@dataclass(eq=False)
class CloisterError(Exception):
    """A refusal or a failure with a stable code.

    Attributes:
        code: stable, UPPER_SNAKE_CASE; programs switch on it.
        message: what was wrong, where, and what to do; never text of a prompt, never a secret.
        status: the gRPC status it travels under.
        metadata: values a program may want (limits, sizes).
        field: path of the offending request field, where there is one.
        retry_after: when a retry makes sense; None when it does not.
    """

    code: str
    message: str
    status: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    metadata: Mapping[str, str] = field(default_factory=dict)
    field: str | None = None
    retry_after: timedelta | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def to_status(self) -> status_pb2.Status:
        """The google.rpc.Status, details included."""
        details: list[Message] = [
            status_pb2.ErrorInfo(reason=self.code, domain=DOMAIN, metadata=dict(self.metadata))
        ]
        if self.field is not None:
            violation = status_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(status_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            retry = status_pb2.RetryInfo()
            retry.retry_delay.FromTimedelta(self.retry_after)
            details.append(retry)
        packed = [Any(type_url=_TYPE_URL + d.DESCRIPTOR.name, value=d.SerializeToString()) for d in details]
        return status_pb2.Status(code=self.status.value[0], message=str(self), details=packed)

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """Trailing metadata that carries the details."""
        return ((DETAILS_TRAILER, self.to_status().SerializeToString()),)


async def abort(
    context: "grpc.aio.ServicerContext[object, object]",
    error: CloisterError,
    trailers: Sequence[tuple[str, str | bytes]] = (),
) -> NoReturn:
    """End the call with `error`, details and further trailers included."""
    await context.abort(error.status, str(error), (*error.trailers(), *trailers))
    raise AssertionError("context.abort returned")


def from_rpc_error(error: grpc.RpcError) -> CloisterError:
    """The error a call ended with; one without our details keeps its gRPC status name as code."""
    call: grpc.Call = error  # type: ignore[assignment]  # every RpcError grpc raises is also a Call
    status, message = call.code(), call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_TRAILER and isinstance(value, bytes):
            return _from_status(value, status, message)
    return CloisterError(status.name, message, status)


def _from_status(raw: bytes, status: grpc.StatusCode, message: str) -> CloisterError:
    try:
        parsed = status_pb2.Status.FromString(raw)
    except DecodeError:
        return CloisterError(status.name, message, status)
    error = CloisterError(status.name, parsed.message or message, status)
    for detail in parsed.details:
        name = detail.type_url.rpartition(".")[2]
        if name == "ErrorInfo":
            info = status_pb2.ErrorInfo.FromString(detail.value)
            error.code, error.metadata = info.reason, dict(info.metadata)
        elif name == "BadRequest":
            violations = status_pb2.BadRequest.FromString(detail.value).field_violations
            error.field = violations[0].field if violations else None
        elif name == "RetryInfo":
            error.retry_after = status_pb2.RetryInfo.FromString(detail.value).retry_delay.ToTimedelta()
    error.message = error.message.removeprefix(f"{error.code}: ")
    return error
