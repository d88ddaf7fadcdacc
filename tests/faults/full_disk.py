"""`python -m tests.faults.full_disk`, in a mount namespace of its own: a house whose control/ is a small tmpfs.

A program and no test, because the mount must be there for the house alone; test_disk.py starts it.
"""

import asyncio
import shutil
import subprocess
from pathlib import Path

from tests.e2e.appliance import eventually
from tests.faults.house import LIMIT_S, House, Running, ends, open_house, under_way
from tests.faults.test_disk import STREAMS, assert_refused, assert_still_readable


def on_small_disk(home: Path) -> None:
    """Move control/ to a file system of its own, before anything is served."""
    control, aside = home / "control", home / "aside"
    control.rename(aside)
    control.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m,mode=0700", "none", control], check=True)
    shutil.copytree(aside, control, dirs_exist_ok=True)
    shutil.rmtree(aside)


def fill(control: Path) -> Path:
    """Take all the room there is."""
    ballast = control / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return ballast
    raise AssertionError("the disk has no end")


async def full_and_empty_again(house: House) -> None:
    """The same as on a disk that fails, with the kernel's ENOSPC."""
    control = house.appliance.home / "control"
    pid = house.appliance.pid_of("control")
    async with house.client() as client:
        streams = await under_way(client, STREAMS)
        ballast = fill(control)
        running = await ends(streams)
        refused = await Running(client, max_tokens=2).end
        while refused.tokens:  # what the files had put by is used up first
            refused = await Running(client, max_tokens=2).end
        eventually(lambda: "SQLITE_FULL" in house.status()["audit_blocked"], "the status says why", LIMIT_S)
        assert_still_readable(house)
        ballast.unlink()
    house.settled()
    assert_refused([*running, refused], refused)
    assert house.appliance.pid_of("control") == pid


if __name__ == "__main__":
    with open_house(prepare=on_small_disk) as house:
        asyncio.run(full_and_empty_again(house))
