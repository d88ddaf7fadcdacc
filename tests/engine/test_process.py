"""The life of a process: bound privately, ready when told, never with a forbidden module, drained on SIGTERM."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from engine.process import ForbiddenModuleError, Process

PROGRAM = """
import sys
from engine.process import run
async def main(process):
    process.ready()
    await process.stopping.wait()
    print("drained", flush=True)
sys.exit(run("probe", main, forbidden={forbidden}))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def notify(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{folder}/notify")
        sock.settimeout(20)
        yield sock


def start(notify: socket.socket, forbidden: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(forbidden=forbidden)],
        env={**os.environ, "NOTIFY_SOCKET": notify.getsockname()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_says_ready_drains_on_sigterm_and_exits_0(notify: socket.socket) -> None:
    process = start(notify, [])
    assert notify.recv(100) == b"READY=1"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "drained\n")
    assert notify.recv(100) == b"STOPPING=1"
    assert json.loads(err.splitlines()[0])["event"] == "ready"


def test_a_process_drains_when_nobody_listens_for_its_state_any_more(folder: Path, notify: socket.socket) -> None:
    process = start(notify, [])
    assert notify.recv(100) == b"READY=1"
    (folder / "notify").unlink()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "drained\n")
    assert "Traceback" not in err


def test_a_process_with_a_forbidden_module_never_says_ready(notify: socket.socket) -> None:
    process = start(notify, ["json"])
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "probe must never load json" in err
    notify.setblocking(False)
    with pytest.raises(BlockingIOError):
        notify.recv(100)


def test_ready_names_every_forbidden_module_that_is_loaded() -> None:
    with pytest.raises(ForbiddenModuleError, match="json, signal"):
        Process("probe", forbidden=["signal", "json", "torch_that_is_absent"]).ready()


async def test_a_socket_is_private_and_replaces_what_a_dead_process_left(folder: Path) -> None:
    path = folder / "x.sock"
    for _ in range(2):
        server = grpc.aio.server()
        Process("probe").listen(server, path)
        await server.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.rename(folder / "left")
        (folder / "left").rename(path)
        await server.stop(None)
        path.touch()


async def test_a_socket_path_the_kernel_cannot_hold_is_refused_before_binding(folder: Path) -> None:
    with pytest.raises(ValueError, match="shorter home"):
        Process("probe").listen(grpc.aio.server(), folder / ("x" * 100))
