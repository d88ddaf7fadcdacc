"""The one table of processes: what each is, how it is started, what must be ready before it, how long it may take.

`cloister serve` runs this table (appliance/supervisor.py) and service units are made from it, so that a process is
started with the same arguments and judged by the same readiness everywhere.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.settings import Settings


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One row of the table.

    Attributes:
        name: what logs, status and messages call it.
        module: run with `python -m`.
        arguments: where one is {home}, {run}, {store} or {derived}, that path takes its place.
        needs: names of the processes that must be ready first.
        ready_within: seconds it may take to say READY (sd_notify(3)).
        drain_within: seconds it may take to end after SIGTERM, before SIGKILL.
        heard_within: seconds it may give no sign of life once it is ready (sd_notify(3), WATCHDOG=1), before
            SIGKILL and another start.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    ready_within: float = 30.0
    drain_within: float = 30.0
    heard_within: float = 20.0

    def argv(self, home: Path) -> tuple[str, ...]:
        """The command, with this interpreter and absolute paths; nothing of the current directory is imported."""
        places = {"{home}": str(home), **{f"{{{name}}}": str(home / name) for name in ("run", "store", "derived")}}
        return (sys.executable, "-P", "-m", self.module, *(places.get(a, a) for a in self.arguments))


# Control's start reads the audit log for open intents: a second for half a million records, longer on a slow disk.
_LOG_READ_WITHIN = 1800.0
# A gateway that has drained still settles and hangs up.
_DRAINED_WITHIN = 20.0


def table(settings: "Settings") -> tuple[ProcessSpec, ...]:
    """The rows, in start order; SIGTERM goes the other way round: the last request in is the last one recorded."""
    home, heard = ("--home", "{home}"), settings.watchdog.heard_seconds
    return (
        ProcessSpec(
            "control",
            "appliance.control",
            (*home, *_control(settings)),
            ready_within=_LOG_READ_WITHIN,
            heard_within=heard,
        ),
        ProcessSpec("importer", "bundles.importer", (*home, *_importer(settings)), heard_within=heard),
        ProcessSpec("engine-host", "engine.host", _engine_host(settings), heard_within=heard),
        ProcessSpec(
            "gateway",
            "appliance.gateway",
            (*home, *_options(settings.gateway.model_dump())),
            needs=("control",),
            drain_within=settings.gateway.drain_seconds + _DRAINED_WITHIN,
            heard_within=heard,
        ),
    )


def _control(settings: "Settings") -> tuple[str, ...]:
    told = json.dumps(settings.changed(), sort_keys=True)
    values = {"audit_wait_seconds": settings.audit.wait_seconds, **settings.tenants.model_dump()}
    return _options({**values, **settings.models.model_dump(), "settings": told})


def _importer(settings: "Settings") -> tuple[str, ...]:
    values = settings.imports.model_dump()
    licences = (f"--licence={licence}" for licence in values.pop("licences"))
    return (*_options(values), *licences)


def _engine_host(settings: "Settings") -> tuple[str, ...]:
    watchdog = settings.watchdog
    values = {
        "heard_within": watchdog.heard_seconds,
        "step_within": watchdog.step_seconds,
        "load_within": watchdog.load_seconds,
    }
    places = ("--run", "{run}", "--store", "{store}", "--derived", "{derived}")
    return (*places, *_options({**values, **settings.devices.model_dump()}))


def _options(values: Mapping[str, object]) -> tuple[str, ...]:
    """`--name=value` for each that is not empty, in this form because a value may begin with a hyphen."""
    return tuple(f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value != "")


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
