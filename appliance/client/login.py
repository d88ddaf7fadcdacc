"""An operator's session: the login socket learns our user from the kernel and answers with a token."""

import json
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from appliance.errors import CloisterError

_ANSWER_S = 5.0
_MOST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class OperatorSession:
    """Who the appliance says we are.

    Attributes:
        operator: the operator's name.
        expires: when the session ends, unless it is revoked before.
        token: goes with every call; never shown.
    """

    operator: str
    expires: datetime
    token: str = field(repr=False)


def log_in(path: Path) -> OperatorSession:
    """A new session from the login socket at `path`.

    Raises:
        CloisterError: NOT_RUNNING, or why the appliance does not know this user.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ANSWER_S)
            sock.connect(str(path))
            answer = json.loads(_line(sock))
    except PermissionError:
        raise CloisterError(
            "NOT_PERMITTED", f"this user may not open {path}; use an operator's account",
            grpc.StatusCode.PERMISSION_DENIED,
        ) from None  # fmt: skip
    except (OSError, ValueError):
        raise not_running(path) from None
    if "error" in answer:
        raise CloisterError(answer["error"], answer.get("message", ""), grpc.StatusCode.UNAUTHENTICATED)
    return OperatorSession(answer["operator"], _instant(answer["expires"]), answer["session"])


def not_running(path: Path) -> CloisterError:
    """Nobody listens at `path`."""
    return CloisterError(
        "NOT_RUNNING",
        f"no appliance answers at {path}; start it with `cloister serve`",
        grpc.StatusCode.UNAVAILABLE,
    )


def _line(sock: socket.socket) -> bytes:
    """The one line that the server sends before it hangs up."""
    received = b""
    while not received.endswith(b"\n") and len(received) < _MOST_BYTES:
        chunk = sock.recv(4096)
        if not chunk:
            break
        received += chunk
    return received


def _instant(value: str | float) -> datetime:
    """ISO 8601, or seconds since 1970."""
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return datetime.fromtimestamp(value, UTC)
