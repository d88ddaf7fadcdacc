"""Aliases and deployments in control.db: what points where, what pointed where before, and what is under trial.

A version is active while an alias that clients call answers with it. An alias whose next version is under trial
still counts for the version before, even where it had to move first; so no state of a version is stored, and none
can contradict what runs.
"""

import time
from collections.abc import Mapping

import grpc
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from appliance.control import records, untold
from appliance.control.db.models import Activation, Alias, AliasHistory, Deployment, Grant
from appliance.control.names import is_name
from appliance.errors import CloisterError

_UNDECIDED = Activation.ended_ns.is_(None)


def active_versions(session: Session) -> dict[str, str]:
    """The versions behind aliases: name@version by digest."""
    return {row.model_digest: row.model_version for row in behind_aliases(session).values()}


def behind_aliases(session: Session) -> Mapping[str, Deployment]:
    """By alias of clients, the deployment that counts as its own."""
    deployments = {row.name: row for row in session.scalars(select(Deployment))}
    trials = {row.alias: row for row in session.scalars(select(Activation).where(_UNDECIDED))}
    found = {}
    for alias in session.scalars(select(Alias).order_by(Alias.name)):
        trial = trials.get(alias.name)
        name = trial.previous if trial and trial.deployment == alias.deployment else alias.deployment
        if is_name(alias.name) and name in deployments:
            found[alias.name] = deployments[name]
    return found


def point(session: Session, alias: str, deployment: str, actor: str) -> None:
    """Make an alias answer with a deployment, and leave for the log what that makes active or retires."""
    existing(session, deployment, "deployment")
    before = active_versions(session)
    session.merge(Alias(name=alias, deployment=deployment))
    session.flush()
    remember(session, alias, deployment)
    leave_transitions(session, before, alias, actor)


def set_alias(session: Session, alias: str, deployment: str, actor: str) -> None:
    """What an operator asks for.

    Raises:
        CloisterError: DEPLOYMENT_NOT_FOUND, ACTIVATION_RUNNING.
    """
    check_not_on_trial(session, alias)
    point(session, alias, deployment, actor)


def remove_alias(session: Session, alias: str, actor: str) -> None:
    """Take an alias away.

    Raises:
        CloisterError: ALIAS_NOT_FOUND, ACTIVATION_RUNNING.
    """
    before = active_versions(session)
    session.delete(existing_alias(session, alias, "name"))
    check_not_on_trial(session, alias)
    session.flush()
    leave_transitions(session, before, alias, actor)


def leave_transitions(session: Session, before: Mapping[str, str], alias: str, actor: str) -> None:
    """Leave for the log which versions have become active, and which are retired, since `before`."""
    after = active_versions(session)
    became = [(digest, after[digest], "active") for digest in sorted(after.keys() - before.keys())]
    ceased = [(digest, before[digest], "retired") for digest in sorted(before.keys() - after.keys())]
    for digest, version, state in became + ceased:
        facts = {"alias": alias, "model_version": version, "model_digest": digest}
        untold.leave(session, records.VERSION_STATE, actor, state, facts)


def keep_deployment(session: Session, row: Deployment, actor: str) -> None:
    """Make or change a deployment; what it changes behind an alias becomes the alias's history.

    Raises:
        CloisterError: ACTIVATION_RUNNING.
    """
    check_not_tried(session, row.name)
    before = active_versions(session)
    session.merge(row)
    session.flush()
    for alias in pointing_at(session, row.name):
        remember(session, alias, row.name)
        leave_transitions(session, before, alias, actor)
        before = active_versions(session)


def remove_deployment(session: Session, name: str) -> None:
    """Take away a deployment that nothing points at.

    Raises:
        CloisterError: DEPLOYMENT_NOT_FOUND, DEPLOYMENT_IN_USE, ACTIVATION_RUNNING.
    """
    row = existing(session, name, "name")
    check_not_tried(session, name)
    aliases = pointing_at(session, name)
    if aliases:
        raise CloisterError(
            "DEPLOYMENT_IN_USE",
            f"aliases point at it: {', '.join(aliases)}; remove them or point them elsewhere first",
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    session.delete(row)


def pointing_at(session: Session, deployment: str) -> list[str]:
    """The aliases that point at a deployment."""
    query = select(Alias.name).where(Alias.deployment == deployment).order_by(Alias.name)
    return list(session.scalars(query))


def grant_alone(session: Session, alias: str, deployment: str, tenant: str) -> None:
    """An alias that one tenant alone may call; no operator can name or grant it."""
    session.merge(Alias(name=alias, deployment=deployment))
    session.merge(Grant(tenant=tenant, alias=alias))
    session.flush()


def withdraw(session: Session, alias: str) -> None:
    """Take such an alias away, with its grant."""
    session.execute(delete(Grant).where(Grant.alias == alias))
    session.execute(delete(Alias).where(Alias.name == alias))


def of_clients(session: Session) -> list[Alias]:
    """The aliases that clients call, by name."""
    return [row for row in session.scalars(select(Alias).order_by(Alias.name)) if is_name(row.name)]


def undecided(session: Session) -> list[Activation]:
    """What is under trial."""
    return list(session.scalars(select(Activation).where(_UNDECIDED).order_by(Activation.started_ns)))


def check_not_on_trial(session: Session, alias: str) -> None:
    """Refuse to touch an alias whose next version is under trial.

    Raises:
        CloisterError: ACTIVATION_RUNNING.
    """
    if session.scalars(select(Activation.id).where(_UNDECIDED, Activation.alias == alias)).first():
        raise _running(f"the alias {alias}")


def check_not_tried(session: Session, deployment: str) -> None:
    """Refuse to touch a deployment that is under trial, or that a failed trial would return to.

    Raises:
        CloisterError: ACTIVATION_RUNNING.
    """
    if any(deployment in (row.deployment, row.previous) for row in undecided(session)):
        raise _running(f"the deployment {deployment}")


def existing(session: Session, name: str, field: str) -> Deployment:
    """The deployment of that name.

    Raises:
        CloisterError: DEPLOYMENT_NOT_FOUND.
    """
    row = session.get(Deployment, name)
    if row is None:
        raise CloisterError(
            "DEPLOYMENT_NOT_FOUND",
            "there is no such deployment; `cloister model list` names them",
            grpc.StatusCode.NOT_FOUND,
            field=field,
        )
    return row


def existing_alias(session: Session, name: str, field: str) -> Alias:
    """The alias of that name, as clients call it.

    Raises:
        CloisterError: ALIAS_NOT_FOUND.
    """
    row = session.get(Alias, name) if is_name(name) else None
    if row is None:
        raise CloisterError(
            "ALIAS_NOT_FOUND",
            "there is no such alias; `cloister alias list` names them",
            grpc.StatusCode.NOT_FOUND,
            field=field,
        )
    return row


def remember(session: Session, alias: str, deployment: str) -> None:
    """Add to an alias's history what it answers with now, where that is something else than before."""
    query = select(AliasHistory).where(AliasHistory.alias == alias).order_by(AliasHistory.number.desc())
    last = session.scalars(query).first()
    row = session.get_one(Deployment, deployment)
    if last is not None and (last.deployment, last.model_digest, last.options) == (
        deployment, row.model_digest, row.options,
    ):  # fmt: skip
        return
    session.add(
        AliasHistory(
            alias=alias,
            deployment=deployment,
            model_version=row.model_version,
            model_digest=row.model_digest,
            options=row.options,
            set_ns=time.time_ns(),
        )
    )
    session.flush()


def _running(what: str) -> CloisterError:
    return CloisterError(
        "ACTIVATION_RUNNING",
        f"{what} has a version under trial; wait until it has ended (`cloister model list`)",
        grpc.StatusCode.FAILED_PRECONDITION,
    )
