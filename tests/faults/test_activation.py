"""Control is killed while it tries a version: the alias is where it was, and the next activation succeeds."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.appliance import ALIAS, CLOISTER, build_bundle, eventually
from tests.faults.house import LIMIT_S, House, short_folder

pytestmark = pytest.mark.timeout(600)  # on a busy machine a model takes a minute to load
VERSION, TRIAL = "demo-notes-s@1.0.2", f"{ALIAS}-2"
NOT_REACHABLE = 4


@pytest.fixture
def version(house: House) -> Iterator[str]:
    """A second version of the model; gone afterwards, and the first one is behind the alias."""
    with short_folder() as folder:
        shutil.copytree(house.appliance.keys, folder / "keys")
        house.appliance.cloister("bundle", "import", str(build_bundle(folder, sequence=2)))
    yield VERSION
    house.appliance.cloister("model", "rollback", ALIAS)
    house.appliance.cloister("model", "unload", TRIAL)
    house.appliance.cloister("bundle", "remove", VERSION)


def behind(house: House) -> str:
    """The deployment that the alias points at."""
    aliases: list[Any] = house.appliance.json("alias", "list")
    return next(str(alias["deployment"]) for alias in aliases if alias["name"] == ALIAS)


def is_back(house: House, pid: int) -> bool:
    """Another control than `pid` answers."""
    try:
        return house.appliance.pid_of("control") != pid and bool(house.status())
    except AssertionError:
        return False


def ends(house: House) -> list[tuple[str, str]]:
    """How each trial ended, as the audit log has it: its decision and the reason."""
    records = [record for record in house.appliance.records() if record["kind"] == "model.activation"]
    return [(record["decision"], record["body"]["facts"]["reason"]) for record in records]


def test_control_killed_during_a_trial_returns_from_it_and_the_next_one_succeeds(
    house: House, version: str
) -> None:
    activate, pid = ("model", "activate", version, "--alias", ALIAS), house.appliance.pid_of("control")
    with house.as_it_was():
        words = [CLOISTER, "--home", house.appliance.home, "--json", *activate]
        watching = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert watching.stdout is not None
        assert "canaries" in (json.loads(line)["stage"] for line in watching.stdout)
        os.kill(pid, signal.SIGKILL)
        watching.communicate(timeout=LIMIT_S)
        assert watching.returncode == NOT_REACHABLE
        eventually(lambda: is_back(house, pid), "control is back", LIMIT_S)
        assert behind(house) == ALIAS
        eventually(lambda: bool(ends(house)), "the return on record", LIMIT_S)
        running = {deployment["name"] for deployment in house.appliance.json("model", "list")}
        assert running == {ALIAS}, "nothing is left of the trial"
        house.appliance.cloister(*activate)
    assert behind(house) == TRIAL
    assert ends(house) == [("returned", "CONTROL_RESTARTED"), ("active", "")]
