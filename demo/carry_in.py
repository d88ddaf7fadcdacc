"""The demo's operator: bundles offered to the appliance, refused or taken in, approved, put behind an alias."""

import os
import signal
import time
from pathlib import Path

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
        kill_importer(demo)
    with demo.page.step("Go on: what is on the disk is not read from the medium again"):
        demo.page.block(demo.cloister("bundle", "import", first, "--volume", second, live=True))
    with demo.page.step("Approve it, and let it take the other's place; clients notice nothing"):
        _approve(demo, LARGE)
        demo.page.block(demo.cloister("model", "activate", LARGE, "--alias", ALIAS, live=True))


def kill_importer(demo: Demo) -> None:
    """SIGKILL to the importer, and a wait until another one answers."""
    (before,) = (pid for pid, what in demo.machine.processes().items() if what == _IMPORTER)
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + _RESTART_LIMIT_S
    while not _answers(demo, before):
        if time.monotonic() > deadline:
            raise CommandError("the importer that was killed was not started again")
        time.sleep(0.1)
    demo.page.good(f"kill -9 {before}; another importer is up by itself")


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
