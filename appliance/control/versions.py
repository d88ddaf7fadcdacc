"""Model versions: where each stands between committed and retired, and whether it may run.

What the importer knows (revoked, damaged, how many custodians must approve) is asked for each time. What control
keeps are the custodians' statements and who accepted a licence. Before a version is loaded the statements are
verified again, under the trust in force at that moment.
"""

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import grpc
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from appliance.control import aliases, records, untold
from appliance.control.audit.record import Json
from appliance.control.db.database import Database
from appliance.control.db.models import AliasHistory, Approval, Deployment, LicenceAcceptance
from appliance.control.imports import Imports
from appliance.errors import CloisterError
from bundles.protos import importer_pb2

COMMITTED, APPROVED, ACTIVE, RETIRED = "committed", "approved", "active", "retired"
REVOKED = "revoked"
"""What the log is told of a version that is deployed; the importer has it of the others."""
_LONGEST_REFERENCE = 256
_LONGEST_ENVELOPE = 1 << 20
_NAMES_SHOWN = 3
_CUSTODIAN = "custodian"


@dataclass(frozen=True)
class Standing:
    """What control knows of all versions.

    Attributes:
        aliases: aliases of clients by digest of the version behind them.
        once_active: digests that were behind an alias at any time.
        approvals: custodians by digest.
    """

    aliases: Mapping[str, Collection[str]] = field(default_factory=dict)
    once_active: frozenset[str] = frozenset()
    approvals: Mapping[str, Collection[str]] = field(default_factory=dict)

    def state(self, version: importer_pb2.ModelVersion) -> str:
        """committed, approved, active or retired."""
        if self.aliases.get(version.model_digest):
            return ACTIVE
        if version.model_digest in self.once_active:
            return RETIRED
        enough = len(self.approvals.get(version.model_digest, ())) >= version.approvals_required
        return APPROVED if enough else COMMITTED


class Versions:
    """The versions that the importer has committed, and what became of them.

    Args:
        database: control.db.
        imports: the importer.
    """

    def __init__(self, database: Database, imports: Imports) -> None:
        self._database = database
        self._imports = imports
        self._approving = asyncio.Lock()

    async def all(self) -> tuple[list[importer_pb2.ModelVersion], Standing]:
        """Every version, oldest first, and where each stands; custodians that the root names no more do not count.

        Raises:
            CloisterError: IMPORTER_UNAVAILABLE.
        """
        versions = await self._imports.versions()
        standing = await self._database.run(_standing)
        if any(v.approvals_required for v in versions):
            roles = {role.name: role.keyids for role in (await self._imports.trust()).roles}
            named = set(roles.get(_CUSTODIAN, ()))
            counting = {digest: sorted(named.intersection(by)) for digest, by in standing.approvals.items()}
            standing = Standing(standing.aliases, standing.once_active, counting)
        return versions, standing

    async def model(self, reference: str) -> importer_pb2.ModelVersion:
        """The model version that `reference` names, with its files.

        Raises:
            CloisterError: INVALID_REFERENCE, VERSION_NOT_FOUND, KIND_NOT_LOADABLE, IMPORTER_UNAVAILABLE.
        """
        version = await self._imports.version(check_reference(reference))
        if version.kind != "model":
            raise CloisterError(
                "KIND_NOT_LOADABLE",
                "this bundle is no model of its own; load the model it belongs to",
                grpc.StatusCode.FAILED_PRECONDITION,
                {"kind": version.kind},
                field="model_version",
            )
        return version

    async def runnable(self, reference: str, accept_licence: bool, operator: str) -> importer_pb2.ModelVersion:
        """The model version that `reference` names, if it may run; an acceptance of its licences is kept.

        Raises:
            CloisterError: as `model`; MODEL_REVOKED, MODEL_DAMAGED, NOT_APPROVED, LICENCE_NOT_ACCEPTED.
        """
        version = await self.model(reference)
        _check_sound(version)
        custodians = await self._custodians(version) if version.approvals_required else []
        if len(custodians) < version.approvals_required:
            raise _refusal(
                "NOT_APPROVED",
                f"{len(custodians)} of {version.approvals_required} custodians approved it; `cloister trust "
                "approve` makes a statement where their keys are, `cloister model approve` brings it in",
                {"approvals": str(len(custodians)), "approvals_required": str(version.approvals_required)},
            )
        asking = [licence.spdx for licence in version.licences if licence.accept]
        accepts = accept_licence
        accepted = await self._database.run(lambda s: _accept(s, version, operator, bool(asking) and accepts))
        if asking and not accepted:
            raise _refusal(
                "LICENCE_NOT_ACCEPTED",
                f"{', '.join(asking)}: to be accepted before first use; read it, then give --accept-licence",
                {"licences": ",".join(asking)},
            )
        return version

    async def approve(self, envelope: bytes, operator: str) -> importer_pb2.ModelVersion:
        """Take custodians' signatures over a version; a repetition changes nothing.

        Raises:
            CloisterError: INVALID_APPROVAL, VERSION_NOT_FOUND, IMPORTER_UNAVAILABLE, or the importer's refusal.
        """
        if not 0 < len(envelope) <= _LONGEST_ENVELOPE:
            raise CloisterError("INVALID_APPROVAL", "give a statement of at most 1 MiB", field="envelope")
        found = await self._imports.verify_approval(envelope)
        version = await self._imports.version(found.model_digest)
        custodians = list(found.custodians)
        async with self._approving:
            before = await self._custodians(version)  # those before a rotation made this one approved no longer
            await self._database.run(lambda s: _approve(s, version, before, custodians, envelope, operator))
        return version

    async def _custodians(self, version: importer_pb2.ModelVersion) -> list[str]:
        """Custodians whose statements hold today."""
        envelopes = await self._database.run(lambda s: _envelopes(s, version.model_digest))
        found: set[str] = set()
        for envelope in envelopes:
            try:
                approval = await self._imports.verify_approval(envelope)
            except CloisterError as refusal:
                if refusal.status is grpc.StatusCode.UNAVAILABLE:
                    raise
                continue  # the key was rotated out or revoked since; it does not count any more
            if approval.model_digest == version.model_digest:
                found.update(approval.custodians)
        return sorted(found)

    async def check(self, model_digest: str) -> None:
        """Refuse a version that must not be put behind an alias after all.

        Raises:
            CloisterError: VERSION_NOT_FOUND, MODEL_REVOKED, MODEL_DAMAGED, IMPORTER_UNAVAILABLE.
        """
        _check_sound(await self._imports.version(model_digest))

    async def follow_trust(self) -> bool:
        """Mark what is deployed as the trust in force has it; whether that changed anything.

        Raises:
            CloisterError: IMPORTER_UNAVAILABLE.
        """
        revoked = {v.model_digest: v.revoked for v in await self._imports.versions()}
        return await self._database.run(lambda s: _mark(s, revoked))

    async def forget(self, model_digest: str) -> None:
        """Forget what was said about a version that is in the store no more."""
        await self._database.run(lambda s: _forget(s, model_digest))


def check_reference(reference: str) -> str:
    """`reference`, if it can name a version.

    Raises:
        CloisterError: INVALID_REFERENCE.
    """
    if not 0 < len(reference) <= _LONGEST_REFERENCE:
        raise CloisterError("INVALID_REFERENCE", "name a model version", field="model_version")
    return reference


def name_of(version: importer_pb2.ModelVersion) -> str:
    """name@version."""
    return f"{version.name}@{version.version}"


def check_unused(session: Session, model_digest: str) -> None:
    """Refuse to take away a version that a deployment runs or a trial may return to.

    Raises:
        CloisterError: VERSION_IN_USE.
    """
    query = select(Deployment.name).where(Deployment.model_digest == model_digest).order_by(Deployment.name)
    names = session.scalars(query).all()
    if names:
        behind = [a for a, row in aliases.behind_aliases(session).items() if row.model_digest == model_digest]
        answering = f", and {', '.join(behind)} answers with it" if behind else ""
        raise CloisterError(
            "VERSION_IN_USE",
            f"it is deployed as {', '.join(names)}{answering}; `cloister model unload` first",
            grpc.StatusCode.FAILED_PRECONDITION,
        )


def _check_sound(version: importer_pb2.ModelVersion) -> None:
    if version.revoked:
        raise _refusal(
            "MODEL_REVOKED",
            f"{name_of(version)} is no longer vouched for ({version.revoked}); import a release that is",
            {"reason": version.revoked},
        )
    if version.damaged:
        shown = ", ".join(version.damaged[:_NAMES_SHOWN])
        raise _refusal(
            "MODEL_DAMAGED",
            f"{len(version.damaged)} of its files are not what was imported: {shown}; importing the same bundle "
            "again repairs them",
            {"files": str(len(version.damaged))},
        )


def _refusal(code: str, message: str, metadata: Mapping[str, str]) -> CloisterError:
    return CloisterError(code, message, grpc.StatusCode.FAILED_PRECONDITION, dict(metadata), field="model_version")


def _standing(session: Session) -> Standing:
    behind: dict[str, list[str]] = {}
    for alias, row in aliases.behind_aliases(session).items():
        behind.setdefault(row.model_digest, []).append(alias)
    approvals: dict[str, list[str]] = {}
    for approval in session.scalars(select(Approval).order_by(Approval.custodian)):
        approvals.setdefault(approval.model_digest, []).append(approval.custodian)
    once = frozenset(session.scalars(select(AliasHistory.model_digest).distinct()))
    return Standing(behind, once, approvals)


def _accept(session: Session, version: importer_pb2.ModelVersion, operator: str, accepts: bool) -> bool:
    if session.get(LicenceAcceptance, version.model_digest) is not None:
        return True
    if accepts:
        row = LicenceAcceptance(model_digest=version.model_digest, operator=operator, accepted_ns=time.time_ns())
        session.add(row)
    return accepts


def _approve(
    session: Session,
    version: importer_pb2.ModelVersion,
    before: Collection[str],
    custodians: Collection[str],
    envelope: bytes,
    operator: str,
) -> None:
    digest, now = version.model_digest, time.time_ns()
    for custodian in custodians:
        session.merge(Approval(model_digest=digest, custodian=custodian, envelope=envelope, approved_ns=now))
    session.flush()
    after = {*before, *custodians}
    if len(before) < version.approvals_required <= len(after):
        facts: dict[str, Json] = {
            "model_version": name_of(version),
            "model_digest": digest,
            "custodians": sorted(after),
            "approvals_required": version.approvals_required,
        }
        untold.leave(session, records.VERSION_STATE, operator, APPROVED, facts)


def _mark(session: Session, revoked: Mapping[str, str]) -> bool:
    """Keep with each deployment whether its version is revoked; each version that is now goes on record once."""
    rows = list(session.scalars(select(Deployment).order_by(Deployment.name)))
    changed = [row for row in rows if row.revoked != revoked.get(row.model_digest, row.revoked)]
    news: dict[str, list[Deployment]] = {}
    for row in changed:
        if not row.revoked:
            news.setdefault(row.model_digest, []).append(row)
        row.revoked = revoked[row.model_digest]
    for digest, found in news.items():
        facts: dict[str, Json] = {
            "model_version": found[0].model_version,
            "model_digest": digest,
            "reason": revoked[digest],
            "deployments": [row.name for row in found],
        }
        untold.leave(session, records.VERSION_STATE, records.CONTROL, REVOKED, facts)
    return bool(changed)


def _envelopes(session: Session, digest: str) -> list[bytes]:
    return list(session.scalars(select(Approval.envelope).where(Approval.model_digest == digest).distinct()))


def _forget(session: Session, digest: str) -> None:
    for table in (Approval, LicenceAcceptance, AliasHistory):
        session.execute(delete(table).where(table.model_digest == digest))
