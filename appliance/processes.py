"""The one table of processes: what each is, how it is started, what must be ready before it, how long it may take.

`cloister serve` runs this table (appliance/supervisor.py) and service units are made from it, so that a process is
started with the same arguments and judged by the same readiness everywhere.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_LISTEN = "127.0.0.1:8443"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One row of the table.

    Attributes:
        name: what logs, status and messages call it.
        module: run with `python -m`.
        arguments: templates; {home}, {run}, {store} and {listen} are filled in.
        needs: names of the processes that must be ready first.
        ready_within: seconds it may take to say READY (sd_notify(3)).
        drain_within: seconds it may take to end after SIGTERM, before SIGKILL.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    ready_within: float = 30.0
    drain_within: float = 30.0

    def argv(self, home: Path, listen: str) -> tuple[str, ...]:
        """The command, with this interpreter and absolute paths; nothing of the current directory is imported."""
        places = {"home": str(home), "run": str(home / "run"), "store": str(home / "store"), "listen": listen}
        return (sys.executable, "-P", "-m", self.module, *(a.format_map(places) for a in self.arguments))


# In start order; SIGTERM goes the other way round, so that the last request in is the last one recorded.
TABLE: tuple[ProcessSpec, ...] = (
    ProcessSpec("control", "appliance.control", ("--home", "{home}")),
    ProcessSpec("importer", "bundles.importer", ("--home", "{home}")),
    ProcessSpec("engine-host", "engine.host", ("--run", "{run}", "--store", "{store}")),
    ProcessSpec("gateway", "appliance.gateway", ("--home", "{home}", "--listen", "{listen}"), needs=("control",)),
)

# The longest file name that any process makes in run/: a worker's socket, for a deployment name of 32 characters.
LONGEST_SOCKET_NAME = len("worker-.sock") + 32


def problems(table: tuple[ProcessSpec, ...]) -> Iterator[str]:
    """What is wrong with a table: a name twice, or a need that does not come earlier."""
    seen: set[str] = set()
    for spec in table:
        if spec.name in seen:
            yield f"{spec.name} is in the table twice"
        yield from (
            f"{spec.name} needs {need}, which does not come before it" for need in spec.needs if need not in seen
        )
        seen.add(spec.name)
