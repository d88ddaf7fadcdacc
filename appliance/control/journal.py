"""The audit log as the rest of control uses it: from the event loop, with a bounded wait, closed when it fails."""

import asyncio
import logging
from concurrent.futures import Future

from appliance.control.audit import AuditLog, Receipt, Record
from appliance.control.audit.errors import blocked
from appliance.errors import CloisterError

_PAGE = 1000

log = logging.getLogger(__name__)


class Journal:
    """Records go in and come out durable, or nothing that depends on them is answered.

    Args:
        log: the open audit log.
        wait_s: seconds that a record may take to become durable.
    """

    def __init__(self, log: AuditLog, wait_s: float) -> None:
        self.log = log
        self._wait_s = wait_s

    def check(self) -> None:
        """Refuse at once while the log takes no records.

        Raises:
            CloisterError: AUDIT_BLOCKED.
        """
        if self.log.blocked:
            raise blocked(self.log.blocked)

    def begin(self, record: Record) -> "Future[Receipt]":
        """Start to commit a record."""
        return self.log.append(record)

    async def durable(self, pending: "Future[Receipt]") -> Receipt:
        """Where a record stands, once it is durable.

        Raises:
            CloisterError: AUDIT_BLOCKED, the log failed or took too long.
        """
        waiting = asyncio.wrap_future(pending)
        try:
            return await asyncio.wait_for(asyncio.shield(waiting), self._wait_s)
        except TimeoutError:
            waiting.add_done_callback(_seen)
            raise blocked("it did not become durable in time") from None

    async def record(self, record: Record) -> Receipt:
        """Commit a record and wait for it.

        Raises:
            CloisterError: AUDIT_BLOCKED.
        """
        return await self.durable(self.begin(record))

    def recorded(self, record: Record, after: int) -> Receipt | None:
        """Where a record of this kind, phase and request stands behind number `after`; it reads the disk."""
        wanted = (record.kind, record.phase, record.request_id)
        while page := self.log.read(after, _PAGE):
            for stored in page:
                if (stored.kind, stored.phase, stored.request_id) == wanted:
                    return Receipt(stored.sequence, stored.leaf_hash)
            after = page[-1].sequence
        return None

    async def note(self, record: Record) -> None:
        """Commit a record of what changes nothing: a login, a look, a refusal.

        It goes on when the log takes no records, so that an operator can still see why; the process's own log then
        says what was not recorded.
        """
        try:
            await self.record(record)
        except CloisterError as error:
            facts = {"kind": record.kind, "actor": record.actor, "decision": record.decision, "code": error.code}
            log.error("not recorded", extra=facts)


def _seen(waiting: "asyncio.Future[Receipt]") -> None:
    """A late failure was reported as a timeout already."""
    if not waiting.cancelled():
        waiting.exception()
