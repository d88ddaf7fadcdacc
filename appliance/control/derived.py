"""The digests of derived files: kept as engine-host tells them, given back to it, forgotten with the last user.

A file's digest is recorded when its first worker starts, and from then on no worker computes with anything else:
each hashes what it reads. A worker that finds another file says so; the digest is then forgotten, and the file
made again at the next start. Each of these is in the audit log.
"""

import logging
import re
import time
from collections.abc import Iterable
from functools import partial

from sqlalchemy import select
from sqlalchemy.orm import Session

from appliance.control import records
from appliance.control.audit.record import Json
from appliance.control.db.database import Database
from appliance.control.db.models import Deployment, Derived
from appliance.control.untold import leave
from appliance.errors import CloisterError
from engine.protos import engine_pb2

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAYOUT = re.compile(r"[a-z0-9]{1,16}-[a-z0-9]{1,16}-[0-9a-f]{16}")
_LARGEST = 1 << 62  # bytes; SQLite's integers end soon after

log = logging.getLogger(__name__)


class DerivedFiles:
    """What engine-host says of derived files, put on record.

    Args:
        database: control.db.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._heard: set[tuple[bool, bytes]] = set()

    async def hear(self, statuses: Iterable[engine_pb2.DeploymentStatus]) -> None:
        """Take note of what is new in what engine-host says; what fails is taken note of the next time."""
        news: dict[tuple[bool, bytes], engine_pb2.Derived] = {}
        for status in statuses:
            if status.HasField("derived"):
                news[True, _key(status.derived)] = status.derived
            if status.HasField("refused"):
                news[False, _key(status.refused)] = status.refused
        for entry, told in list(news.items()):
            if entry not in self._heard and _is_sound(told):
                try:
                    await self._database.run(partial(_keep if entry[0] else _forget, told=told))
                except CloisterError as error:
                    log.warning("a derived file is not on record", extra={"code": error.code})
                    del news[entry]
        self._heard = set(news)


def in_use(session: Session) -> list[engine_pb2.Derived]:
    """All that is on record; what is of no deployment's model any more is forgotten first."""
    models = select(Deployment.model_digest)
    for row in session.scalars(select(Derived).where(Derived.model_digest.not_in(models))).all():
        _tell(session, "removed", row)
        session.delete(row)
    rows = session.scalars(select(Derived).order_by(Derived.model_digest, Derived.layout))
    return [
        engine_pb2.Derived(model_digest=row.model_digest, layout=row.layout, sha256=row.sha256, size=row.size)
        for row in rows
    ]


def _keep(session: Session, told: engine_pb2.Derived) -> None:
    """Record a file of a model that a deployment has."""
    row = session.get(Derived, (told.model_digest, told.layout))
    wanted = session.scalars(select(Deployment.name).where(Deployment.model_digest == told.model_digest)).first()
    if wanted is None or (row is not None and (row.sha256, row.size) == (told.sha256, told.size)):
        return
    _replace(session, told)
    row = session.merge(
        Derived(
            model_digest=told.model_digest,
            layout=told.layout,
            sha256=told.sha256,
            size=told.size,
            recorded_ns=time.time_ns(),
        )
    )
    _tell(session, "recorded", row)


def _replace(session: Session, told: engine_pb2.Derived) -> None:
    """Forget files of this model, kernels and numbers that other libraries or sources made: nobody uses them."""
    kind = told.layout.rpartition("-")[0]
    of_model = select(Derived).where(Derived.model_digest == told.model_digest)
    for row in session.scalars(of_model).all():
        if row.layout != told.layout and row.layout.rpartition("-")[0] == kind:
            _tell(session, "replaced", row)
            session.delete(row)


def _forget(session: Session, told: engine_pb2.Derived) -> None:
    """Forget a file that was not what is on record."""
    row = session.get(Derived, (told.model_digest, told.layout))
    if row is not None and row.sha256 == told.sha256:
        _tell(session, "refused", row)
        session.delete(row)


def _key(told: engine_pb2.Derived) -> bytes:
    return told.SerializeToString(deterministic=True)


def _tell(session: Session, decision: str, row: Derived) -> None:
    facts: dict[str, Json] = {
        "model_digest": row.model_digest,
        "layout": row.layout,
        "sha256": row.sha256,
        "size": row.size,
    }
    leave(session, records.DERIVED, records.CONTROL, decision, facts)


def _is_sound(told: engine_pb2.Derived) -> bool:
    digests = (told.model_digest, told.sha256)
    return all(map(_SHA256.fullmatch, digests)) and bool(_LAYOUT.fullmatch(told.layout)) and told.size < _LARGEST
