"""What the console knows: a frozen state, and the one function that takes what the appliance said into it.

No Textual, no clock, no socket: events carry their instant, so that a test is a list of events.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

import grpc

from appliance.errors import CloisterError
from appliance.protos import admin_pb2

RATE_WINDOW_S = 5.0
"""Rates are differences of counters over at most this long."""
FAST_S, SLOW_S = 1.0, 5.0
"""The console asks every second, and on a slow terminal every five."""
SLOW_DRAIN_S = 0.3
"""A terminal that takes longer to swallow what is painted is slow."""
_ENDED = ("committed", "rejected")
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def is_silence(error: CloisterError) -> bool:
    """Nobody answered; else somebody said no."""
    return error.status in _SILENT


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters of one worker at one instant."""

    at: float
    pid: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Import:
    """An import as its progress told.

    Attributes:
        path: the bundle.
        began: when the console first heard of it, monotonic seconds.
        progress: the newest message; None before the first.
        rated: (instant, bytes) from when bytes began to move.
        now: the instant of the newest message.
        asked: the instant of the newest status; beside `now` it tells how long nothing moved.
        lost: why the console no longer hears of it; the importer goes on.
        refused: it was refused at the door, so nothing goes on.
        elsewhere: this console only knows that it runs: somebody else began it, or the importer was started anew.
    """

    path: str
    began: float
    progress: admin_pb2.ImportBundleResponse | None = None
    rated: tuple[float, int] | None = None
    now: float = 0.0
    asked: float = 0.0
    lost: str = ""
    refused: bool = False
    elsewhere: bool = False

    @property
    def running(self) -> bool:
        """Watched, and neither committed, nor rejected, nor out of sight."""
        ended = self.progress is not None and self.progress.state in _ENDED
        return not ended and not self.lost and not self.elsewhere

    @property
    def silence(self) -> float:
        """Seconds without a word from the importer."""
        return max(0.0, self.asked - self.now)

    @property
    def rate(self) -> float:
        """Bytes per second, as the importer tells or since bytes began to move; 0 while unknown."""
        if self.progress is not None and self.progress.bytes_per_second:
            return float(self.progress.bytes_per_second)
        if self.progress is None or self.rated is None or self.now <= self.rated[0]:
            return 0.0
        return max(0, self.progress.bytes_done - self.rated[1]) / (self.now - self.rated[0])


@dataclass(frozen=True, slots=True)
class AuditPage:
    """One page of the log and how it was asked for; `newer` are the starts of the pages before it."""

    request: admin_pb2.QueryAuditRequest
    answer: admin_pb2.QueryAuditResponse
    newer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """Everything the screens are made of; None stands for what was not heard yet.

    Attributes:
        heard: wall-clock time of the newest status.
        trouble: why the appliance is not reached, None while it is.
        unanswered: what the page shows and was not told when it last asked, and why; empty when it was.
        note: what the last action said; and whether it is bad.
    """

    status: admin_pb2.GetStatusResponse | None = None
    tenants: tuple[admin_pb2.Tenant, ...] | None = None
    keys: tuple[admin_pb2.Key, ...] | None = None
    versions: tuple[admin_pb2.ModelVersion, ...] | None = None
    aliases: tuple[admin_pb2.Alias, ...] | None = None
    audit: AuditPage | None = None
    verdict: admin_pb2.VerifyAuditResponse | None = None
    verifying: bool = False
    importing: Import | None = None
    samples: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    heard: datetime | None = None
    trouble: CloisterError | None = None
    unanswered: str = ""
    note: str = ""
    note_is_bad: bool = False

    def tokens_per_second(self, deployment: str) -> float | None:
        """Generated tokens over the window; None until two readings of the same worker are there."""
        samples = self.samples.get(deployment, ())
        if len(samples) < 2 or samples[-1].at <= samples[0].at:
            return None
        return (samples[-1].tokens - samples[0].tokens) / (samples[-1].at - samples[0].at)


@dataclass(frozen=True, slots=True)
class StatusRead:
    """GetStatus answered at `at` (monotonic seconds) and `time` (the console's clock)."""

    status: admin_pb2.GetStatusResponse
    at: float
    time: datetime


@dataclass(frozen=True, slots=True)
class TenantsRead:
    """ListTenants and, where asked, ListKeys answered."""

    tenants: tuple[admin_pb2.Tenant, ...]
    keys: tuple[admin_pb2.Key, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelsRead:
    """ListModelVersions, ListAliases and ListImports answered."""

    versions: tuple[admin_pb2.ModelVersion, ...]
    aliases: tuple[admin_pb2.Alias, ...]
    imports: tuple[admin_pb2.Import, ...] = ()


@dataclass(frozen=True, slots=True)
class Unreached:
    """GetStatus did not answer."""

    error: CloisterError


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The status came, but not `what` the page shows besides."""

    what: str
    error: CloisterError


@dataclass(frozen=True, slots=True)
class Turned:
    """Another page is looked at; what was said on the one before is not of it."""


@dataclass(frozen=True, slots=True)
class Noted:
    """An action has something to say; an empty text says nothing."""

    text: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Verifying:
    """A verification began."""


@dataclass(frozen=True, slots=True)
class Verified:
    """It ended; None when it was not answered."""

    verdict: admin_pb2.VerifyAuditResponse | None


@dataclass(frozen=True, slots=True)
class ImportBegan:
    """The operator confirmed an import."""

    path: str
    at: float


@dataclass(frozen=True, slots=True)
class ImportTold:
    """The importer said how far it is."""

    progress: admin_pb2.ImportBundleResponse
    at: float


@dataclass(frozen=True, slots=True)
class ImportSeen:
    """The operator has seen how it ended."""


@dataclass(frozen=True, slots=True)
class ImportLost:
    """The stream ended before the import did, or the import was refused at the door."""

    error: CloisterError


Event = (
    StatusRead | TenantsRead | ModelsRead | AuditPage | Unreached | Unanswered | Turned | Noted
    | Verifying | Verified | ImportBegan | ImportTold | ImportLost | ImportSeen
)  # fmt: skip


def reduce(state: State, event: Event) -> State:
    """The state after `event`."""
    match event:
        case StatusRead():
            return _heard(state, event)
        case TenantsRead():
            keys = state.keys if event.keys is None else event.keys
            return replace(state, tenants=event.tenants, keys=keys, unanswered="")
        case ModelsRead():
            importing = _elsewhere(state.importing, event.imports)
            return replace(
                state, versions=event.versions, aliases=event.aliases, importing=importing, unanswered=""
            )
        case AuditPage():
            return replace(state, audit=event)
        case Unreached() | Unanswered():
            return _unheard(state, event)
        case Turned():
            return replace(state, note="", note_is_bad=False, unanswered="")
        case Noted():
            return replace(state, note=event.text, note_is_bad=event.bad)
        case Verifying() | Verified():
            verdict = event.verdict if isinstance(event, Verified) else None
            return replace(state, verifying=isinstance(event, Verifying), verdict=verdict)
        case ImportBegan() | ImportSeen() | ImportTold() | ImportLost():
            return replace(state, importing=_imported(state.importing, event))


def next_interval(interval: float, drain_s: float) -> float:
    """Seconds until the next question: doubled while the terminal is slow, back to one when it is not."""
    return min(SLOW_S, interval * 2) if drain_s > SLOW_DRAIN_S else max(FAST_S, interval / 2)


def _heard(state: State, event: StatusRead) -> State:
    importing = replace(state.importing, asked=event.at) if state.importing else None
    samples = _sampled(state.samples, event)
    return replace(
        state, status=event.status, samples=samples, heard=event.time, trouble=None, importing=importing
    )


def _unheard(state: State, event: Unreached | Unanswered) -> State:
    if isinstance(event, Unreached):
        return replace(state, trouble=event.error, samples={})
    why = "no answer in time" if is_silence(event.error) else str(event.error)
    return replace(state, unanswered=f"{event.what}: {why}; shown is what was heard before")


def _sampled(samples: Mapping[str, tuple[Sample, ...]], event: StatusRead) -> dict[str, tuple[Sample, ...]]:
    """The window of each deployment that has counters; a worker that was started again begins anew."""
    found = {}
    for deployment in event.status.deployments:
        if not deployment.HasField("engine"):
            continue
        new = Sample(event.at, deployment.worker_pid, deployment.engine.tokens_generated)
        kept = samples.get(deployment.name, ())
        if kept and (kept[-1].pid != new.pid or kept[-1].tokens > new.tokens):
            kept = ()
        recent = [s for s in kept if s.at >= event.at - RATE_WINDOW_S] or kept[-1:]
        found[deployment.name] = (*recent, new)
    return found


def _elsewhere(before: Import | None, imports: tuple[admin_pb2.Import, ...]) -> Import | None:
    """The import to show: the console's own while it is in sight, else the newest that runs without it."""
    running = [found for found in imports if found.progress.state not in _ENDED]
    if before is not None and not before.elsewhere:
        own = before.progress.import_id if before.progress and before.lost else ""
        running = [found for found in running if found.progress.import_id == own]
        if not (own and running):
            return before
    return Import(running[0].path, 0.0, running[0].progress, elsewhere=True) if running else None


def _imported(before: Import | None, event: "ImportBegan | ImportTold | ImportLost | ImportSeen") -> Import | None:
    if isinstance(event, ImportBegan):
        return Import(event.path, event.at, now=event.at)
    if before is None or isinstance(event, ImportSeen):
        return None
    if isinstance(event, ImportLost):
        refused = before.progress is None and not is_silence(event.error)
        return replace(before, lost=str(event.error), refused=refused)
    rated = before.rated
    if rated is None and event.progress.bytes_total:
        rated = (event.at, event.progress.bytes_done)
    return replace(before, progress=event.progress, rated=rated, now=event.at)
