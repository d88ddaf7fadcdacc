"""A trial in control.db: each step is one transaction, and from each the alias finds back to where it was.

Beside: the new deployment is loaded while the alias stays; at the end the alias moves. Switch-first, where memory
holds one of the two alone: the present deployment is parked (it gives its memory away and keeps its row), then the
alias moves, then the canaries are tried; a failure brings both back. A control that was killed meanwhile finds the
trial undecided at its next start, and returns.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc
from sqlalchemy import select
from sqlalchemy.orm import Session

from appliance.control import aliases, records, untold
from appliance.control.activation.canaries import Verdict
from appliance.control.activation.system_tenant import ensure_tenant, revoke_all
from appliance.control.audit.record import Json
from appliance.control.db.models import Activation, Alias, AliasHistory, Deployment
from appliance.control.names import LONGEST_DEPLOYMENT, SYSTEM_TENANT, TRIAL_ALIAS
from appliance.errors import CloisterError
from bundles.protos import importer_pb2

ACTIVATION, ROLLBACK = "activation", "rollback"
RESTARTED = "CONTROL_RESTARTED"
_MOST_NAMES = 1000
PLANNED, LOADING, CANARIES, SWITCHED, ACTIVE, RETURNED = (
    "planned", "loading", "canaries", "switched", "active", "returned",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What is to be put behind an alias.

    Attributes:
        kind: ACTIVATION, or ROLLBACK, which tries no canaries: the version was marked good before.
        alias: the alias.
        operator: who asked.
        version: the model version, with files and canaries.
        options: of the deployment, serialised.
        likely: a deployment that may run it already; empty for none.
    """

    kind: str
    alias: str
    operator: str
    version: importer_pb2.ModelVersion
    options: bytes
    likely: str = ""

    @property
    def canaries(self) -> Sequence[importer_pb2.Canary]:
        """What is tried."""
        return self.version.canaries if self.kind == ACTIVATION else ()


@dataclass(frozen=True)
class Trial:
    """A trial that was begun.

    Attributes:
        id: of its row.
        deployment: the one under trial.
        made: it was made for this.
        previous: what the alias pointed at; empty for nothing.
    """

    id: str
    deployment: str
    made: bool
    previous: str


@dataclass(frozen=True)
class Place:
    """Where a version may be tried.

    Attributes:
        row: the deployment, made or found.
        made: it was not there before.
        previous: what the alias points at; None for nothing.
        idle: deployments that earlier activations of the alias left loaded, by name.
        previous_is_shared: another alias points at the previous one, so that it cannot be parked.
    """

    row: Deployment
    made: bool
    previous: Deployment | None
    idle: Sequence[str] = field(default=())
    previous_is_shared: bool = False


def present_options(session: Session, alias: str) -> bytes:
    """The options of what an alias points at; none for an alias that there is not."""
    row = session.get(Alias, alias)
    return aliases.existing(session, row.deployment, "alias").options if row else b""


def earlier(session: Session, alias: str) -> AliasHistory:
    """What an alias answered with before the version it answers with now.

    Raises:
        CloisterError: ALIAS_NOT_FOUND, NO_EARLIER_VERSION.
    """
    present = aliases.existing(session, aliases.existing_alias(session, alias, "alias").deployment, "alias")
    query = (
        select(AliasHistory)
        .where(AliasHistory.alias == alias, AliasHistory.model_digest != present.model_digest)
        .order_by(AliasHistory.number.desc())
    )
    found = session.scalars(query).first()
    if found is None:
        raise CloisterError(
            "NO_EARLIER_VERSION",
            f"{alias} has answered with no other version that is in the store",
            grpc.StatusCode.FAILED_PRECONDITION,
            field="alias",
        )
    return found


def place(session: Session, wanted: Wanted, files: bytes) -> Place:
    """Where to try: a deployment that runs the same already, or a new one under a free name, ALIAS-SEQUENCE.

    Raises:
        CloisterError: ACTIVATION_RUNNING.
    """
    if aliases.undecided(session):
        raise running()
    alias = session.get(Alias, wanted.alias)
    previous = session.get(Deployment, alias.deployment) if alias else None
    row, made = _deployment(session, wanted, files)
    shared = previous is not None and len(aliases.pointing_at(session, previous.name)) > 1
    return Place(row, made, previous, _idle(session, wanted.alias, row.name), shared)


def running() -> CloisterError:
    """Trials come one after the other."""
    return CloisterError(
        "ACTIVATION_RUNNING",
        "another version is under trial, and one is at a time; wait until it has ended (`cloister model list`)",
        grpc.StatusCode.FAILED_PRECONDITION,
    )


def begin(session: Session, wanted: Wanted, where: Place, park: bool) -> Trial:
    """Record the trial; `park` takes the present deployment's memory, for the new one, which `switch` makes.

    Raises:
        CloisterError: ACTIVATION_RUNNING; ALIAS_CHANGED, since `place` looked somebody moved the alias, or took
            away what would be tried.
    """
    if aliases.undecided(session):
        raise running()
    ensure_tenant(session)
    previous = where.previous.name if where.previous else ""
    alias = session.get(Alias, wanted.alias)
    found = where.made or session.get(Deployment, where.row.name) is not None
    if (alias.deployment if alias else "") != previous or not found:
        raise CloisterError(
            "ALIAS_CHANGED",
            f"{wanted.alias} or its deployment was changed by somebody else just now; look, then try again",
            grpc.StatusCode.ABORTED,
        )
    row = Activation(
        id=str(uuid.uuid4()),
        kind=wanted.kind,
        alias=wanted.alias,
        operator=wanted.operator,
        model_version=where.row.model_version,
        model_digest=where.row.model_digest,
        deployment=where.row.name,
        made=where.made,
        previous=previous,
        stage=PLANNED,
        reason="",
        started_ns=time.time_ns(),
        ended_ns=None,
    )
    session.add(row)
    session.flush()
    if park:
        aliases.existing(session, previous, "alias").parked = True
    else:
        _put_on_trial(session, row, where.row)
    return Trial(row.id, row.deployment, row.made, previous)


def switch(session: Session, trial: Trial, deployment: Deployment) -> None:
    """Switch-first: the memory is free, so the new deployment is made and the alias moves to it, on trial."""
    row = session.get_one(Activation, trial.id)
    _put_on_trial(session, row, deployment)
    session.merge(Alias(name=row.alias, deployment=row.deployment))
    row.stage = SWITCHED


def mark_good(session: Session, trial: Trial, verdict: Verdict) -> list[str]:
    """The end, well: the alias moves (or stays moved), and what was kept for it before is let go.

    Returns:
        The aliases' deployments that are no longer wanted; they were taken away.
    """
    row = session.get_one(Activation, trial.id)
    before = aliases.active_versions(session)
    _take_off_trial(session, row)
    _end(session, row, ACTIVE, "", verdict)
    session.merge(Alias(name=row.alias, deployment=row.deployment))
    session.flush()
    if row.previous:
        aliases.existing(session, row.previous, "alias").parked = False
    aliases.remember(session, row.alias, row.deployment)
    aliases.leave_transitions(session, before, row.alias, row.operator)
    gone = [name for name in _idle(session, row.alias, row.deployment) if name != row.previous]
    for name in gone:
        session.delete(session.get_one(Deployment, name))
    return gone


def withdraw(session: Session, trial: Trial) -> None:
    """The first half of a return: the alias is where it was, what was made for the trial is gone."""
    row = session.get_one(Activation, trial.id)
    _take_off_trial(session, row)
    if row.previous:
        session.merge(Alias(name=row.alias, deployment=row.previous))
        session.flush()
    if row.made and (made := session.get(Deployment, row.deployment)) is not None:
        session.delete(made)
    session.flush()


def give_back(session: Session, trial: Trial, reason: str, verdict: Verdict) -> None:
    """The second half: a parked deployment gets its memory back, and the trial is over."""
    row = session.get_one(Activation, trial.id)
    if row.previous:
        aliases.existing(session, row.previous, "alias").parked = False
    _end(session, row, RETURNED, reason, verdict)


def settle_left(session: Session) -> int:
    """Return from every trial that the control before this one left undecided; how many there were."""
    left = aliases.undecided(session)
    for row in left:
        trial = Trial(row.id, row.deployment, row.made, row.previous)
        withdraw(session, trial)
        give_back(session, trial, RESTARTED, Verdict(0))
    revoke_all(session)
    return len(left)


def drop_idle(session: Session, names: Sequence[str]) -> None:
    """Take away deployments that were kept for a rollback, to make room."""
    for name in names:
        if not aliases.pointing_at(session, name) and (row := session.get(Deployment, name)) is not None:
            session.delete(row)


def _deployment(session: Session, wanted: Wanted, files: bytes) -> tuple[Deployment, bool]:
    version = wanted.version
    likely = session.get(Deployment, wanted.likely)
    if likely is not None and _is_it(likely, wanted):
        return likely, False
    for name in _names(wanted):
        found = session.get(Deployment, name)
        if found is None:
            row = Deployment(
                name=name,
                model_version=f"{version.name}@{version.version}",
                model_digest=version.model_digest,
                files=files,
                options=wanted.options,
                created_ns=time.time_ns(),
                parked=False,
                revoked="",
            )
            return row, True
        if _is_it(found, wanted):
            return found, False
    raise CloisterError("TOO_MANY_DEPLOYMENTS", "no name is free for another deployment; unload some")


def _is_it(deployment: Deployment, wanted: Wanted) -> bool:
    """It runs the version that is wanted, as it is wanted."""
    return (deployment.model_digest, deployment.options) == (wanted.version.model_digest, wanted.options)


def _names(wanted: Wanted) -> Iterator[str]:
    """Names for the deployment of a trial, the best one first."""
    for number in range(1, _MOST_NAMES):
        suffix = f"-{wanted.version.sequence}" + (f"-{number}" if number > 1 else "")
        yield wanted.alias[: LONGEST_DEPLOYMENT - len(suffix)].rstrip("-") + suffix


def _idle(session: Session, alias: str, but: str) -> list[str]:
    """Deployments that activations of an alias made and nothing points at any more."""
    made = Activation.alias == alias, Activation.stage == ACTIVE, Activation.made.is_(True)
    query = select(Activation.deployment).where(*made)
    names = sorted(set(session.scalars(query)) - {but})
    return [n for n in names if session.get(Deployment, n) is not None and not aliases.pointing_at(session, n)]


def _put_on_trial(session: Session, row: Activation, deployment: Deployment) -> None:
    session.merge(deployment)
    session.flush()
    aliases.grant_alone(session, trial_alias(row.deployment), row.deployment, SYSTEM_TENANT)
    row.stage = LOADING


def _take_off_trial(session: Session, row: Activation) -> None:
    aliases.withdraw(session, trial_alias(row.deployment))


def _end(session: Session, row: Activation, stage: str, reason: str, verdict: Verdict) -> None:
    row.stage, row.reason, row.ended_ns = stage, reason, time.time_ns()
    session.flush()
    facts: dict[str, Json] = {
        "kind": row.kind,
        "alias": row.alias,
        "model_version": row.model_version,
        "model_digest": row.model_digest,
        "deployment": row.deployment,
        "previous": row.previous,
        "reason": reason,
        "canaries": verdict.total,
        "canaries_tried": verdict.done,
        "canaries_passed": verdict.passed,
        "canaries_failed": {str(index): code for index, code in verdict.failures},
    }
    untold.leave(session, records.ACTIVATION, row.operator, stage, facts)


def trial_alias(deployment: str) -> str:
    """What the tenant `system` calls a version under trial."""
    return TRIAL_ALIAS.format(deployment=deployment)
