"""The operator's client, for the command line and the console: logged in, typed, errors as CloisterError."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from appliance.client.login import OperatorSession, log_in, not_running
from appliance.errors import DETAILS_TRAILER, CloisterError, from_rpc_error
from appliance.protos import admin_pb2_grpc

SESSION_METADATA = "cloister-session"
# A console that outlives control finds the next one within a second; grpc by itself waits up to two minutes.
_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# A session this close to its end is not used for a new call.
_MARGIN = timedelta(seconds=5)


class AdminClient:
    """An operator at the appliance in `home`.

    Logs in when first used, and again when the session has ended. Calls raise CloisterError. Use it in `with`, or
    call `close`.

    Args:
        home: the appliance's home directory.

    Attributes:
        system: the appliance as a whole.
        models: bundles, versions, deployments, aliases.
        tenants: tenants and keys.
        devices: devices and memory plans.
        audit: the audit log.

    Example:
        >>> from appliance.protos import admin_pb2
        >>> with AdminClient(Path("home")) as admin:
        ...     print(admin.system.GetStatus(admin_pb2.GetStatusRequest()).gateway_address)
    """

    def __init__(self, home: Path) -> None:
        run = (home / "run").absolute()
        self._login = run / "login.sock"
        self._socket = run / "admin.sock"
        self._session: OperatorSession | None = None
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(f"unix:{self._socket}", options=_OPTIONS)
        channel = grpc.intercept_channel(self._channel, _Sessions(self))
        self.system = admin_pb2_grpc.SystemServiceStub(channel)
        self.models = admin_pb2_grpc.ModelServiceStub(channel)
        self.tenants = admin_pb2_grpc.TenantServiceStub(channel)
        self.devices = admin_pb2_grpc.DeviceServiceStub(channel)
        self.audit = admin_pb2_grpc.AuditServiceStub(channel)

    @property
    def operator(self) -> str:
        """Our name, as the appliance knows it.

        Raises:
            CloisterError: NOT_RUNNING, or why the appliance does not know this user.
        """
        return self.session().operator

    def session(self, ended: OperatorSession | None = None) -> OperatorSession:
        """The session in use, or a new one when there is none, it has expired, or it is the one that `ended`."""
        with self._lock:
            current = self._session
            if current is None or current is ended or current.expires - _MARGIN <= datetime.now(UTC):
                current = self._session = log_in(self._login)
            return current

    def error(self, error: grpc.RpcError) -> CloisterError:
        """What a call ended with; a server that is not there is NOT_RUNNING."""
        known = from_rpc_error(error)
        trailers: Any = error.trailing_metadata() or ()
        told = any(key == DETAILS_TRAILER for key, _ in trailers)
        return known if told or known.status is not grpc.StatusCode.UNAVAILABLE else not_running(self._socket)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: list[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Sessions(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Puts the session on every call, takes a new one when it has ended, and raises what we raise."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """One call; a session that was revoked or forgotten is replaced once."""
        session = self._client.session()
        outcome = continuation(_with(session, client_call_details), request)
        if outcome.code() is grpc.StatusCode.UNAUTHENTICATED:
            session = self._client.session(ended=session)
            outcome = continuation(_with(session, client_call_details), request)
        if isinstance(outcome, grpc.RpcError) and outcome.code() is not grpc.StatusCode.OK:
            raise self._client.error(outcome) from None
        return outcome

    def intercept_unary_stream(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """One stream; when its session was forgotten before the first message, it starts again in a new one."""
        session = self._client.session()

        def again() -> Any:
            fresh = self._client.session(ended=session)
            return continuation(_with(fresh, client_call_details), request)

        call = continuation(_with(session, client_call_details), request)
        return AdminStream(call, again, self._client.error)


class AdminStream(Iterator[Any]):
    """A server's stream, its errors raised as CloisterError; `cancel` ends it."""

    def __init__(
        self, call: Any, again: Callable[[], Any], error: Callable[[grpc.RpcError], CloisterError]
    ) -> None:
        self._call = call
        self._again: Callable[[], Any] | None = again
        self._error = error

    def __next__(self) -> Any:
        """The next message.

        Raises:
            CloisterError: what the stream ended with.
        """
        again, self._again = self._again, None
        try:
            return next(self._call)
        except grpc.RpcError as error:
            if again is None or self._call.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise self._error(error) from None
        self._call = again()
        return next(self)

    def cancel(self) -> None:
        """End the stream."""
        self._call.cancel()

    def __getattr__(self, name: str) -> Any:
        """The rest of a call: `code`, `trailing_metadata` and the like."""
        return getattr(self._call, name)


def _with(session: OperatorSession, details: Any) -> Any:
    metadata = [*(details.metadata or ()), (SESSION_METADATA, session.token)]
    return _Details(
        details.method,
        details.timeout,
        metadata,
        details.credentials,
        details.wait_for_ready,
        getattr(details, "compression", None),
    )
