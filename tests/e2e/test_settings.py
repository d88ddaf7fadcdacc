"""A house started with a settings file does what the file says."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from appliance.client import Client, CloisterError
from tests.e2e.appliance import cloister, initialise, serving

_FILE = """
[gateway]
advertise = "127.0.0.1"
max_request_bytes = 2048
default_deadline_seconds = 33
drain_seconds = 0.5

[audit]
wait_seconds = 4.5

[tenants]
max_concurrent = 3
weight = 70
key_days = 12

[logs]
level = "WARNING"
kept = 0

[watchdog]
heard_seconds = 41
step_seconds = 301
load_seconds = 77

[devices]
inventory = "{inventory}"
"""
_GPU = {"id": "GPU-a", "kind": "cuda", "name": "Example", "memory_bytes": 8, "memory_available_bytes": 4}


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    cloister("trust", "init", "--out", str(folder / "keys"))
    initialise(folder / "home", folder / "keys")
    yield folder / "home"
    shutil.rmtree(folder)


def words_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def children_of(pid: int) -> list[str]:
    return [words_of(int(child)) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_init_writes_a_settings_file_that_sets_nothing(home: Path) -> None:
    assert "sets 0 of" in cloister("--home", str(home), "config", "check").stdout
    assert (home / "cloister.toml").read_text() == cloister("config", "example").stdout


def test_what_the_file_sets_is_what_the_running_house_does(home: Path) -> None:
    recorded = home.parent / "machine.json"
    cpu = {"id": "cpu", "kind": "cpu", "name": "Elsewhere", "memory_bytes": 1 << 40, "memory_available_bytes": 99}
    recorded.write_text(json.dumps({"devices": [cpu, _GPU]}))
    (home / "cloister.toml").write_text(_FILE.format(inventory=recorded))
    with serving(home) as process:
        cloister("--home", str(home), "status", "--wait", "30")
        said = cloister("--home", str(home), "tenant", "add", "ward", "--models", "m").stdout
        assert re.search(r"ward .* 3 +70\b", said), said
        issued = cloister("--home", str(home), "--json", "key", "issue", "--tenant", "ward", "--app", "a",
                          "--out", str(home.parent / "ward"))  # fmt: skip
        assert '"address": "127.0.0.1:' in issued.stdout
        with Client.from_dir(home.parent / "ward") as client, pytest.raises(CloisterError) as refused:
            client.generate("m", "x" * 2048).result()
        assert (refused.value.code, refused.value.status) == (
            "REQUEST_TOO_LARGE", grpc.StatusCode.INVALID_ARGUMENT
        )  # fmt: skip
        assert refused.value.metadata["max_request_bytes"] == "2048"
        listed = json.loads(cloister("--home", str(home), "--json", "gpu", "list").stdout)
        assert (listed["recorded_from"], listed["nvml"]) == (str(recorded), "")
        assert [device["name"] for device in listed["devices"]] == ["Elsewhere", "Example"]
        shown = cloister("--home", str(home), "gpu", "list").stdout
        assert f"recorded from {recorded}: not this machine's devices" in shown
        words = "\n".join(children_of(process.pid))
        query = cloister("--home", str(home), "--json", "audit", "query", "--kind", "appliance.control").stdout
        (started,) = (record for record in map(json.loads, query.splitlines()) if record["decision"] == "started")
        assert started["body"]["facts"]["settings"]["audit.wait_seconds"] == "4.5"
        assert "logs.max_bytes" not in started["body"]["facts"]["settings"]
    for word in (
        "--default-deadline-seconds=33.0",
        "--drain-seconds=0.5",
        "--audit-wait-seconds=4.5",
        "--heard-within=41.0",
        "--step-within=301.0",
        "--load-within=77.0",
    ):
        assert word in words
    logged = "".join(path.read_text() for path in (home / "logs").glob("*.log"))
    assert '"level": "info"' not in logged
