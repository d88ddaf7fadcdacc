"""The disk under the records fails or is full while requests run: none gets its OK, and all goes on by itself."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest

from tests.e2e.appliance import eventually
from tests.faults.house import LIMIT_S, Ended, House, Running, ends, under_way

pytestmark = pytest.mark.timeout(600)  # on a busy machine the appliance alone takes a minute to start
STREAMS = 6
REFUSALS = {
    (grpc.StatusCode.UNAVAILABLE, "AUDIT_BLOCKED"),  # the intent or the outcome cannot be recorded
    (grpc.StatusCode.UNAVAILABLE, "DATABASE_FAILED"),  # the reservation or the ledger's row cannot
}


@contextmanager
def failing_fsync(house: House) -> Iterator[None]:
    """Every fsync and fdatasync of control fails with EIO in here: what a dying disk does, by strace(1)."""
    pid = house.appliance.pid_of("control")
    inject = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO"]
    with subprocess.Popen(["strace", "-f", "-qq", "-o", "/dev/null", *inject, "-p", str(pid)]) as tracer:
        try:
            eventually(lambda: tracer.poll() is not None or is_traced(pid), "strace holds control", LIMIT_S)
            if tracer.poll() is not None:
                pytest.skip("strace may not attach to a process here")
            yield
        finally:
            tracer.terminate()


def is_traced(pid: int) -> bool:
    """Whether a tracer holds every thread of a process; proc(5)."""
    states = [(thread / "status").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    return all("\nTracerPid:\t0\n" not in state for state in states)


@contextmanager
def no_byte_more(house: House) -> Iterator[None]:
    """No file of control may grow or change in here: write(2) fails with EFBIG, SQLite says SQLITE_IOERR_WRITE."""
    pid = house.appliance.pid_of("control")
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
async def test_an_fsync_that_fails_poisons_the_log_and_it_is_verified_before_the_next_record(house: House) -> None:
    await refused_while_broken(house, failing_fsync, "SQLITE_IOERR")


async def test_a_write_that_fails_refuses_every_request_and_service_resumes_when_it_does_not(house: House) -> None:
    await refused_while_broken(house, no_byte_more, "SQLITE_IOERR")


async def refused_while_broken(
    house: House, fault: Callable[[House], AbstractContextManager[None]], reason: str
) -> None:
    """Streams run, then the disk fails: no OK, and no new answer; reading goes on; nobody restarts anything."""
    control = house.appliance.pid_of("control")
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            with fault(house):
                running = await ends(streams)
                refused = await Running(client, max_tokens=2).end
                eventually(lambda: reason in str(house.status()["audit_blocked"]), "the status says why", LIMIT_S)
                assert_still_readable(house)
    assert_refused(running, refused)
    assert house.appliance.pid_of("control") == control
    assert house.appliance.records()[-1]["sequence"] > 0
    kinds = [record["kind"] for record in house.appliance.records()]
    assert "audit.resumed" in kinds


def assert_refused(running: list[Ended], refused: Ended) -> None:
    """The streams that ran got no OK unless they had it before; a new one got not one token."""
    assert (running[-1].status, running[-1].code) in REFUSALS
    assert {(end.status, end.code) for end in running} <= {*REFUSALS, (grpc.StatusCode.OK, "")}
    assert (refused.status, refused.code) in REFUSALS
    assert refused.tokens == 0


def assert_still_readable(house: House) -> None:
    """Records are read and the log is verified while none is taken."""
    assert house.appliance.records()
    assert house.appliance.json("audit", "verify")["intact"]


FULL_DISK = ["unshare", "--mount", "sh", "-c", 'mount --make-rprivate / && exec "$@"', "sh"]


def test_a_full_file_system_refuses_every_request_and_service_resumes_when_there_is_room() -> None:
    """In mounts of its own: the records lie on a small tmpfs that another file fills; SQLite says SQLITE_FULL."""
    own = [*FULL_DISK[:1], "--user", "--map-root-user", *FULL_DISK[1:]] if os.getuid() else FULL_DISK
    if (
        shutil.which("unshare") is None
        or subprocess.run([*own, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no mounts of one's own here")
    done = subprocess.run(
        [*own, sys.executable, "-m", "tests.faults.full_disk"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "USER": "root"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
