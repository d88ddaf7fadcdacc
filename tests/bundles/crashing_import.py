"""Dies at every call that changes the disk, one after the other, and tells what the next start finds.

    crashing_import.py HOME BUNDLE WORK STEP

HOME has one committed version; BUNDLE is the next. Every round copies HOME, imports in a forked child whose N-th
such call is SIGKILL (N grows by STEP), then opens the copy again, looks, and imports once more. Prints a JSON list
of rounds.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from bundles.content.inspector import Inspector, Verdict
from bundles.importer.importing import Workplace, import_bundle

_CALLS = ("open", "pwrite", "fsync", "fdatasync", "fchmod", "rename", "mkdir", "unlink")


class Unquestioning(Inspector):
    """Another process would only slow the rounds; it writes nothing."""

    def inspect(self, files: Any) -> Verdict:
        size = os.fstat(files["model.safetensors"]).st_size
        return Verdict("LlamaForCausalLM", 512, size, "float16", ("generate",))


def die_at(call: int) -> None:
    """Make the `call`-th disk-changing call of this process its last, before it takes effect."""
    left = call

    def wrap(real: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return counted

    for name in _CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def attempt(home: Path, bundle: Path, call: int) -> bool:
    """Import in a child that dies at `call`; whether it died."""
    child = os.fork()
    if child == 0:
        place = Workplace.open(home, Unquestioning())
        die_at(call)
        import_bundle(place, "crashing", bundle, lambda _: None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def loadable(place: Workplace) -> bool:
    """Every file of every committed version is in the store and is what its name says."""
    files = [str(file["sha256"]) for version in place.ledger.versions() for file in version.files]
    return all(hashlib.sha256(place.store.path_of(digest).read_bytes()).hexdigest() == digest for digest in files)


def look(home: Path, bundle: Path, call: int) -> dict[str, object]:
    place = Workplace.open(home, Unquestioning())
    after_crash = place.ledger.versions()[-1].sequence
    whole = loadable(place)
    records = sorted(int(path.stem) for path in (home / "store" / "models" / "tiny").iterdir())
    whole = whole and records == [version.sequence for version in place.ledger.versions()]
    import_bundle(place, "again", bundle, lambda _: None)
    found = {
        "call": call,
        "after_crash": after_crash,
        "after_retry": place.ledger.versions()[-1].sequence,
        "loadable": whole and loadable(place),
        "staging": [path.name for path in (home / "store" / "staging").iterdir()],
        "floor": place.floors().models["tiny"].sequence,
    }
    place.ledger.close()
    return found


def main(home: Path, bundle: Path, work: Path, step: int) -> None:
    outcomes = []
    for call in range(1, 1000, step):
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
