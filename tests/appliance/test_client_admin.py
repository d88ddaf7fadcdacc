"""The operator's client: logs in through the login socket, says who it is on every call, raises what we raise."""

import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from appliance.client.admin import AdminClient
from appliance.client.login import log_in
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, admin_pb2_grpc


class FakeControl(
    admin_pb2_grpc.SystemServiceServicer, admin_pb2_grpc.AuditServiceServicer, admin_pb2_grpc.TenantServiceServicer
):
    """Knows the sessions it gave out, until they are revoked."""

    def __init__(self, run: Path) -> None:
        self.valid_s: float = 3600
        self.refusal: dict[str, str] | None = None
        self.logins = 0
        self.valid: set[str] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(run / "login.sock"))
        self._listener.listen()
        threading.Thread(target=self._answer, daemon=True).start()
        self.server = grpc.server(ThreadPoolExecutor(4))
        admin_pb2_grpc.add_SystemServiceServicer_to_server(self, self.server)
        admin_pb2_grpc.add_AuditServiceServicer_to_server(self, self.server)
        admin_pb2_grpc.add_TenantServiceServicer_to_server(self, self.server)
        self.server.add_insecure_port(f"unix:{run / 'admin.sock'}")
        self.server.start()

    def stop(self) -> None:
        self._listener.close()
        self.server.stop(None).wait()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(json.dumps(self._login()).encode() + b"\n")

    def _login(self) -> dict[str, Any]:
        if self.refusal:
            return self.refusal
        self.logins += 1
        token = f"token-{self.logins}"
        self.valid.add(token)
        return {"session": token, "operator": "alice", "expires": time.time() + self.valid_s}

    def _check(self, context: Any) -> None:
        if dict(context.invocation_metadata()).get("cloister-session") not in self.valid:
            self._refuse(context, CloisterError("SESSION_UNKNOWN", "log in", grpc.StatusCode.UNAUTHENTICATED))

    def _refuse(self, context: Any, error: CloisterError) -> None:
        context.set_trailing_metadata(error.trailers())
        context.abort(error.status, str(error))

    def GetStatus(self, request: Any, context: Any) -> Any:
        self._check(context)
        return admin_pb2.GetStatusResponse(operator="alice", gateway_address="h:1")

    def TailAudit(self, request: Any, context: Any) -> Any:
        self._check(context)
        yield admin_pb2.TailAuditResponse(sequence=1)
        yield admin_pb2.TailAuditResponse(sequence=2)
        if request.limit:
            self._refuse(context, CloisterError("AUDIT_BLOCKED", "full", grpc.StatusCode.UNAVAILABLE))

    def VerifyAudit(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def ListTenants(self, request: Any, context: Any) -> Any:
        self._check(context)
        self._refuse(
            context, CloisterError("ROLE_REQUIRED", "ask another", grpc.StatusCode.PERMISSION_DENIED, field="x")
        )

    def AddTenant(self, request: Any, context: Any) -> Any: ...
    def SetTenant(self, request: Any, context: Any) -> Any: ...
    def SuspendTenant(self, request: Any, context: Any) -> Any: ...
    def IssueKey(self, request: Any, context: Any) -> Any: ...
    def ListKeys(self, request: Any, context: Any) -> Any: ...
    def RevokeKey(self, request: Any, context: Any) -> Any: ...


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    (folder / "run").mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def control(home: Path) -> Iterator[FakeControl]:
    fake = FakeControl(home / "run")
    yield fake
    fake.stop()


def status(admin: AdminClient) -> str:
    return admin.system.GetStatus(admin_pb2.GetStatusRequest()).operator


def test_one_login_serves_many_calls(home: Path, control: FakeControl) -> None:
    with AdminClient(home) as admin:
        assert control.logins == 0, "nothing is asked before it is needed"
        assert [status(admin) for _ in range(3)] == ["alice"] * 3
        assert [r.sequence for r in admin.audit.TailAudit(admin_pb2.TailAuditRequest())] == [1, 2]
        assert admin.operator == "alice"
    assert control.logins == 1


def test_a_session_about_to_expire_is_replaced_before_the_call(home: Path, control: FakeControl) -> None:
    control.valid_s = 1
    with AdminClient(home) as admin:
        status(admin)
        status(admin)
    assert control.logins == 2


def test_a_session_that_control_forgot_is_replaced_for_calls_and_streams(home: Path, control: FakeControl) -> None:
    with AdminClient(home) as admin:
        status(admin)
        control.valid.clear()
        assert status(admin) == "alice"
        control.valid.clear()
        assert [r.sequence for r in admin.audit.TailAudit(admin_pb2.TailAuditRequest())] == [1, 2]
    assert control.logins == 3


def test_a_refusal_arrives_as_our_error(home: Path, control: FakeControl) -> None:
    with AdminClient(home) as admin:
        with pytest.raises(CloisterError) as error:
            admin.tenants.ListTenants(admin_pb2.ListTenantsRequest())
        assert (error.value.code, error.value.field) == ("ROLE_REQUIRED", "x")
        tail = admin.audit.TailAudit(admin_pb2.TailAuditRequest(limit=1))
        assert [next(tail).sequence, next(tail).sequence] == [1, 2]
        with pytest.raises(CloisterError) as error:
            next(tail)
        assert (error.value.code, error.value.status) == ("AUDIT_BLOCKED", grpc.StatusCode.UNAVAILABLE)


def test_a_stream_can_be_given_up(home: Path, control: FakeControl) -> None:
    with AdminClient(home) as admin:
        tail = admin.audit.TailAudit(admin_pb2.TailAuditRequest())
        next(tail)
        tail.cancel()
        with pytest.raises(CloisterError, match="CANCELLED"):
            list(tail)


def test_an_unknown_user_is_told_why(home: Path, control: FakeControl) -> None:
    control.refusal = {"error": "OPERATOR_UNKNOWN", "message": "user 1000 is no operator"}
    with AdminClient(home) as admin, pytest.raises(CloisterError) as error:
        status(admin)
    assert (error.value.code, error.value.status) == ("OPERATOR_UNKNOWN", grpc.StatusCode.UNAUTHENTICATED)


def test_an_appliance_that_is_not_running_says_how_to_start_it(home: Path) -> None:
    with AdminClient(home) as admin, pytest.raises(CloisterError) as error:
        status(admin)
    assert (error.value.code, error.value.status) == ("NOT_RUNNING", grpc.StatusCode.UNAVAILABLE)
    assert "cloister serve" in error.value.message


def test_an_appliance_that_stopped_after_login_is_not_running(home: Path, control: FakeControl) -> None:
    with AdminClient(home) as admin:
        status(admin)
        control.server.stop(None).wait()
        with pytest.raises(CloisterError) as error:
            status(admin)
        with pytest.raises(CloisterError) as streamed:
            list(admin.audit.TailAudit(admin_pb2.TailAuditRequest()))
    assert (error.value.code, streamed.value.code) == ("NOT_RUNNING", "NOT_RUNNING")


def test_the_token_is_never_shown(home: Path, control: FakeControl) -> None:
    session = log_in(home / "run" / "login.sock")
    assert session.token in control.valid
    assert session.token not in repr(session)
