"""Imports in a child that is killed at its N-th change of the disk, again and again, and tells what was found.

    crashing_import.py HOME BUNDLE WORK STEP

Every round copies HOME to WORK and imports BUNDLE in a forked child whose N-th change is SIGKILL (N grows by
STEP), then opens the copy again, looks, and imports once more. Prints a JSON list of rounds. With STEP 0 it
imports into HOME itself, once, for whoever kills it from outside.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from tests.bundles.dying import DyingFs
from tests.bundles.stores import bring, damaged_names, open_place


class KilledFs(DyingFs):
    """Ends the process where the other ends the import."""

    def change(self, name: str) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().change(name)


def attempt(home: Path, bundle: Path, call: int) -> bool:
    """Import in a child that dies at `call`; whether it died."""
    child = os.fork()
    if child == 0:
        fs = KilledFs()
        place = open_place(home, fs)
        fs.arm(call)
        bring(place, bundle)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def look(home: Path, bundle: Path, call: int) -> dict[str, object]:
    place = open_place(home)
    after_crash = [version.sequence for version in place.ledger.versions()]
    damaged = damaged_names(place)
    bring(place, bundle)
    found = {
        "call": call,
        "after_crash": after_crash,
        "after_retry": [version.sequence for version in place.ledger.versions()],
        "damaged": damaged + damaged_names(place),
    }
    place.ledger.close()
    return found


def main(home: Path, bundle: Path, work: Path, step: int) -> None:
    if step == 0:
        bring(open_place(home), bundle)
        return
    outcomes = []
    for call in range(0, 2000, step):
        copy = work / str(call)
        shutil.copytree(home, copy)
        died = attempt(copy, bundle, call)
        outcomes.append(look(copy, bundle, call))
        shutil.rmtree(copy)
        if not died:
            break
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
