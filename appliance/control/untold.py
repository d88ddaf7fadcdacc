"""Changes of control.db that the audit log is told exactly once, whatever is killed when.

Two databases share no transaction. So what changes in control.db without a call in progress that would record it
(an alias that moves by itself, a version that becomes active) leaves a row here, in the same transaction; the row
is copied into the log and then deleted. A crash may fall between the two, so the log is asked first.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from appliance.control.audit import Record
from appliance.control.audit.record import Json
from appliance.control.db.database import Database
from appliance.control.db.models import Untold
from appliance.control.journal import Journal
from appliance.errors import CloisterError

log = logging.getLogger(__name__)


def leave(session: Session, kind: str, actor: str, decision: str, facts: Mapping[str, Json]) -> None:
    """Leave an event for the log, in the transaction of what it tells."""
    row = Untold(
        id=str(uuid.uuid4()),
        kind=kind,
        actor=actor,
        decision=decision,
        facts=json.dumps(dict(facts)),
        utc_ns=time.time_ns(),
    )
    session.add(row)
    session.flush()


class UntoldEvents:
    """Copies what was left.

    Args:
        database: control.db.
        journal: the audit log.
    """

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal
        self._telling = asyncio.Lock()

    async def tell(self) -> None:
        """Copy all there is, oldest first; what the log does not take is left for the next time."""
        async with self._telling:
            try:
                for row in await self._database.run(_rows):
                    await self._copy(row)
            except CloisterError as error:
                log.warning("changes are not in the audit log yet", extra={"code": error.code})

    async def _copy(self, row: Untold) -> None:
        facts: dict[str, Json] = {**json.loads(row.facts), "utc_ns": row.utc_ns}
        record = Record(row.kind, "event", row.actor, row.decision, row.id, facts=facts)
        if not await asyncio.to_thread(self._journal.log.has, row.kind, row.id):
            await self._journal.record(record)
        await self._database.run(lambda s: _drop(s, row.id))


def _rows(session: Session) -> list[Untold]:
    return list(session.scalars(select(Untold).order_by(Untold.utc_ns)))


def _drop(session: Session, name: str) -> None:
    session.execute(delete(Untold).where(Untold.id == name))
