"""The demo's operator: bundles offered to the appliance, refused or taken in, approved, put behind an alias."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo.machine import CommandError
from demo.release import release_expired
from demo.scene import ALIAS, LARGE, SITE, SMALL, Demo

_IMPORTER = "bundles.importer"
_RESTART_LIMIT_S = 30.0


def refuse(demo: Demo) -> None:
    """A bundle past its date, and a copy of the good one with one bit changed."""
    with demo.page.step("Offer a release that expired eleven months ago"):
        release_expired(demo)
        demo.refused("bundle", "import", demo.path("expired.bundle"))
    with demo.page.step("Offer a copy of the good bundle with one bit flipped among the weights"):
        tampered = demo.machine.folder / "tampered.bundle"
        where = flip_one_bit(demo.machine.folder / "small.bundle", tampered)
        demo.page.line(f"bit 0 of byte {where:,} of {tampered.stat().st_size:,}:")
        demo.refused("bundle", "import", demo.path("tampered.bundle"))


def bring_in_small(demo: Demo) -> None:
    """The small model: imported, approved by a second person, activated."""
    with demo.page.step("Import the bundle itself: each byte verified before it is believed"):
        demo.page.block(demo.cloister("bundle", "import", demo.path("small.bundle"), live=True))
    with demo.page.step("A custodian approves it, with a key that stays away from the appliance"):
        _approve(demo, SMALL)
    with demo.page.step("Activate it: load, try its canaries, give it the name that clients call"):
        demo.page.block(demo.cloister("model", "activate", SMALL, "--alias", ALIAS, "--deterministic", live=True))


def bring_in_large(demo: Demo) -> None:
    """The large model from two media, the importer killed between them; then it takes the small one's place."""
    first, second = demo.path("medium-1/large.bundle.001"), demo.path("medium-2/large.bundle.002")
    with demo.page.step("Import from one medium; kill the importer while it waits for the other"):
        demo.page.command(("cloister", "bundle", "import", first))
        waiting = demo.machine.run(("bundle", "import", first), expect=3)
        demo.page.paragraph(waiting.stderr.strip().splitlines()[-1])
        before = _waiting(demo)
        kill_importer(demo)
    with demo.page.step("It goes on by itself, and does not ask for the first medium again"):
        shutil.move(demo.machine.folder / "medium-1", demo.machine.folder / "medium-1-taken-out")
        after = _waiting(demo)
        if after["import_id"] != before["import_id"] or after["volume_wanted"] != before["volume_wanted"]:
            raise CommandError("the import that was under way did not go on by itself")
        percent = 100 * int(after["bytes_done"]) // int(after["bytes_total"])
        demo.page.good(f"import {after['import_id'][:8]}, {percent} % on the disk, waits for volume 2 as before")
        demo.page.block(demo.cloister("bundle", "import", first, "--volume", second, live=True))
    with demo.page.step("Approve it, and let it take the other's place; clients notice nothing"):
        _approve(demo, LARGE)
        demo.page.block(demo.cloister("model", "activate", LARGE, "--alias", ALIAS, live=True))


def kill_importer(demo: Demo) -> None:
    """SIGKILL to the importer, and a wait until another one answers."""
    (before,) = (pid for pid, what in demo.machine.processes().items() if what == _IMPORTER)
    os.kill(before, signal.SIGKILL)
    _until(lambda: _answers(demo, before), "the importer that was killed was not started again")
    demo.page.good(f"kill -9 {before}; another importer is up by itself")


def _waiting(demo: Demo) -> dict[str, Any]:
    """The one import that is under way, once it waits for a volume."""
    found: list[dict[str, Any]] = []

    def waits() -> bool:
        found[:] = [told for one in demo.facts("bundle", "imports") if (told := one["progress"])["volume_wanted"]]
        return bool(found)

    _until(waits, "no import waits for a volume")
    return found[0]


def _until(done: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + _RESTART_LIMIT_S
    while not done():
        if time.monotonic() > deadline:
            raise CommandError(failure)
        time.sleep(0.1)


def _answers(demo: Demo, before: int) -> bool:
    """Another importer than `before` runs, and control has reached it."""
    running = {pid for pid, what in demo.machine.processes().items() if what == _IMPORTER} - {before}
    peers = demo.facts("status")["peers"]
    return bool(running) and all(peer["connected"] for peer in peers if peer["name"] == "importer")


def _approve(demo: Demo, model: str) -> None:
    (version,) = (v for v in demo.facts("bundle", "list") if v["name"] == model)
    approval = demo.path(f"{model}.approval")
    demo.cloister("trust", "approve", version["model_digest"], "--appliance", SITE,
                  "--key", demo.path("keys/custodian-2.key"), "--out", approval)  # fmt: skip
    demo.page.block(demo.cloister("model", "approve", approval))


def flip_one_bit(source: Path, target: Path) -> int:
    """Copy a file with one bit changed three quarters in, where the weights lie; the byte's offset."""
    content = bytearray(source.read_bytes())
    where = len(content) * 3 // 4
    content[where] ^= 1
    target.write_bytes(content)
    return where
