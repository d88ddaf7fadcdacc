"""What an error becomes at the command line: a code, a message, an exit status. This is the one mapping."""

import errno
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.errors import CloisterError

FAILED, BAD_USAGE, REFUSED, NOT_REACHABLE = 1, 2, 3, 4
# Preconditions that nobody refused: a directory on this side lacks something.
_HERE = {"CREDENTIALS_MISSING", "ADDRESS_MISSING"}


class UsageError(Exception):
    """The words are well formed and make no sense together."""

    code = "BAD_USAGE"
    exit_status = BAD_USAGE


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a command did not do what it was asked.

    Attributes:
        code: stable, UPPER_SNAKE_CASE.
        message: what was wrong, where, what to do.
        exit_status: 1 failed, 2 bad usage, 3 refused, 4 not reachable.
        metadata: values a program may want.
    """

    code: str
    message: str
    exit_status: int
    metadata: Mapping[str, str] = field(default_factory=dict)


def describe(error: Exception) -> Failure:
    """The failure that `error` stands for; an attribute `exit_status` of the error wins."""
    from appliance.errors import CloisterError  # here, because it loads grpc, which `--help` must not wait for

    error = _unwrapped(error)
    if isinstance(error, CloisterError):
        return Failure(error.code, error.message, _exit_status(error), error.metadata)
    code = getattr(error, "code", None)
    if isinstance(code, str):
        message = str(error).removeprefix(f"{code}: ")
        return Failure(code, message, int(getattr(error, "exit_status", FAILED)))
    if isinstance(error, OSError):
        status = NOT_REACHABLE if isinstance(error, ConnectionError) else FAILED
        return Failure(errno.errorcode.get(error.errno or 0, "OS_ERROR"), _os_message(error), status)
    return Failure("INTERNAL", _internal(error), FAILED)


def _unwrapped(error: Exception) -> Exception:
    """A gRPC error as the CloisterError it carries."""
    import grpc

    if isinstance(error, grpc.RpcError):
        from appliance.errors import from_rpc_error

        return from_rpc_error(error)
    return error


def _exit_status(error: "CloisterError") -> int:
    import grpc

    own = getattr(error, "exit_status", None)
    if own is not None:
        return int(own)
    refusals = {
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.DATA_LOSS,
    }
    if error.code == "NOT_RUNNING" or error.status is grpc.StatusCode.UNAVAILABLE:
        return NOT_REACHABLE
    if error.code in _HERE:
        return FAILED
    if error.code.startswith("INVALID_") and error.status is grpc.StatusCode.INVALID_ARGUMENT:
        return BAD_USAGE
    return REFUSED if error.status in refusals else FAILED


def _os_message(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename is not None else str(error)


def _internal(error: Exception) -> str:
    """An error nobody foresaw: its kind and place; all of it with CLOISTER_TRACEBACK=1."""
    if os.environ.get("CLOISTER_TRACEBACK"):
        return "".join(traceback.format_exception(error))
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "unknown place"
    return f"{type(error).__name__} at {place}: {error} (a defect; CLOISTER_TRACEBACK=1 shows where)"
