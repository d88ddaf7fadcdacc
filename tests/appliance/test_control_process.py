"""Control as a process of its own: ready, killed, started again, drained."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.client.admin import AdminClient
from appliance.control.audit import load_public_key
from appliance.control.audit.verification import verify
from appliance.control.home import Home
from appliance.errors import CloisterError
from appliance.protos import admin_pb2
from tests.appliance.control_house import make_home


@pytest.fixture
def home() -> Iterator[Home]:
    made = make_home()
    yield made
    shutil.rmtree(made.root.parent)


def start(home: Home) -> "subprocess.Popen[bytes]":
    """Start control, and return when it says READY or has ended."""
    notify = home.root.parent / "notify"
    notify.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(notify))
        sock.settimeout(0.2)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "appliance.control", "--home", str(home.root)],
            env={**os.environ, "NOTIFY_SOCKET": str(notify)},
            stderr=(home.root / "logs" / "control.log").open("ab"),
        )
        while process.poll() is None:
            try:
                if sock.recv(4096).startswith(b"READY=1"):
                    break
            except TimeoutError:
                continue
    return process


def test_control_serves_survives_kill_9_and_drains_on_sigterm(home: Home) -> None:
    first = start(home)
    for path in (home.control_socket, home.admin_socket, home.login_socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with AdminClient(home.root) as admin:
        admin.tenants.AddTenant(admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="ward")))
    assert start(home).wait() == 1, "a second control in the same home must refuse to start"
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(home)
    with AdminClient(home.root) as admin:
        (tenant,) = admin.tenants.ListTenants(admin_pb2.ListTenantsRequest()).tenants
        assert tenant.name == "ward"
        with pytest.raises(CloisterError, match="TENANT_EXISTS"):
            admin.tenants.AddTenant(admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="ward")))
        kinds = [r.kind for r in admin.audit.TailAudit(admin_pb2.TailAuditRequest())]
    assert kinds.count("appliance.control") == 2
    second.send_signal(signal.SIGTERM)
    assert second.wait() == 0
    verdict = verify(home.audit_database, home.audit_head, load_public_key(home.audit_key.with_suffix(".pub")))
    assert (verdict.intact, verdict.open_intents) == (True, 0)
    assert not Path(f"{home.database}-wal").exists()


def test_control_refuses_a_log_that_was_tampered_with(home: Home) -> None:
    home.audit_head.write_text("cloister/test/audit\n0\n\n")
    assert start(home).wait() == 1
    assert "AUDIT_TAMPERED" in (home.root / "logs" / "control.log").read_text()
    assert not home.admin_socket.exists()


def test_what_control_loads_has_neither_torch_nor_a_tokenizer() -> None:
    code = "import sys, appliance.control.__main__; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"torch", "tokenizers", "jinja2"}.isdisjoint(loaded)
