"""`cloister doctor` tells a process that stands still from one that works."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.appliance import CLOISTER, Appliance, eventually


def test_the_doctor_names_the_processes_that_stand_still(appliance: Appliance) -> None:
    well = _processes(appliance)
    assert well["level"] == "OK"
    assert (
        well["found"]
        == "answered: importer, engine-host, control, gateway heard by control, deployment notes ready"
    )
    with _standing_still(appliance, "appliance.gateway", "engine.host"):
        eventually(lambda: not appliance.status()["gateway_address"], "control misses the gateway")
        ill = _processes(appliance)
    assert ill["level"] == "FAIL"
    assert "engine-host: does not answer within 3 s" in ill["found"]
    assert "gateway: has not been heard by control" in ill["found"]
    assert ill["found"].endswith("answered: importer, control, deployment notes ready")
    appliance.cloister("status", "--wait", "30")


@contextmanager
def _standing_still(appliance: Appliance, *modules: str) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    found = [pid for pid in _children(appliance.supervisor.pid) if any(m in _words(pid) for m in modules)]
    assert len(found) == len(modules)
    try:
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in found:
            os.kill(pid, signal.SIGCONT)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _processes(appliance: Appliance) -> dict[str, str]:
    """The doctor's finding about the processes."""
    command = [str(CLOISTER), "--home", str(appliance.home), "--json", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(finding for finding in json.loads(done.stdout) if finding["check"] == "processes")
