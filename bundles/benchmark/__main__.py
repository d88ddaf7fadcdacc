"""`python -m bundles.benchmark HOME BUNDLE`: one import by the importer's own code, in a process of its own.

Prints a JSON object: how it ended, seconds in all and by state, and the most memory that this process ever had.
"""

import json
import sys
import time
from pathlib import Path

from bundles.importer.importing import import_bundle
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress


def main(home: Path, bundle: Path) -> None:
    """Import and tell."""
    place = Workplace.open(home)
    times: dict[str, float] = {}

    def note(progress: Progress) -> None:
        times.setdefault(progress.state, time.perf_counter())

    began = time.perf_counter()
    ended = import_bundle(place, "benchmark", bundle, note)
    seconds = time.perf_counter() - began
    place.ledger.close()
    told = {
        "state": ended.state,
        "reason": ended.reason,
        "message": ended.message,
        "seconds": seconds,
        "bytes": ended.bytes_done,
        "until": {state: moment - began for state, moment in times.items()},
        "rss_peak": _peak(),
    }
    print(json.dumps(told))


def _peak() -> int:
    """Most bytes that this process has had in memory; unlike getrusage's, not those of who started it."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
