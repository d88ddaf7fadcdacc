"""What the control before this one left: leases kept for their gateways, intents that get an outcome, trials."""

import asyncio
import logging
import time
from collections.abc import Mapping

from appliance.control import records
from appliance.control.activation import trial
from appliance.control.admission import reservations
from appliance.control.admission.leases import LeaseBook
from appliance.control.admission.reservations import ABANDONED, NEVER_STARTED, Ending, Reservation
from appliance.control.audit import Receipt, StoredRecord
from appliance.control.db.database import Database
from appliance.control.journal import Journal

RESTARTED = "CONTROL_RESTARTED"

log = logging.getLogger(__name__)


async def recover(database: Database, journal: Journal, leases: LeaseBook, settings: Mapping[str, str]) -> None:
    """Take over from the control before; call it before anybody is answered.

    A reservation whose intent is on record may belong to a stream that still runs: it stays in force, and its
    gateway has the silence limit, counted from the end of this, to claim it. One without an intent never began and
    is settled with nothing charged. Any other intent without an outcome gets one, as the ledger has it. A version
    under trial is taken back: its alias is where it was. The record of the start has the settings that are not
    their default.

    Raises:
        CloisterError: AUDIT_BLOCKED, DATABASE_FAILED.
    """
    left = await database.run(reservations.left_open)
    intents = await asyncio.to_thread(journal.log.open_intents)
    begun = {lease: intent for intent in intents if (lease := _lease(intent))}
    kept = {reservation.lease for reservation, _ in left if reservation.lease in begun}
    for reservation, _ in left:
        if reservation.lease not in kept:
            await _close_unstarted(database, journal, reservation)
    others = [intent for intent in intents if _lease(intent) not in kept]
    for intent in others:
        await journal.record(records.closing(intent, await _ending(database, intent), RESTARTED))
    facts: records.Facts = {
        "leases_kept": len(kept),
        "leases_never_started": len(left) - len(kept),
        "intents_closed": len(others),
        "trials_returned": await database.run(trial.settle_left),
        "settings": dict(settings),
    }
    await journal.record(records.control_event("started", facts))
    for reservation, gateway_id in left:
        if reservation.lease in kept:
            intent = begun[reservation.lease]
            leases.keep(reservation, intent.actor, gateway_id, Receipt(intent.sequence, intent.leaf_hash))
    log.info("recovered", extra=dict(facts))


async def _close_unstarted(database: Database, journal: Journal, reservation: Reservation) -> None:
    """The record comes before the ledger: without an intent, nothing else would tell a next start to write it."""
    ending = Ending(ABANDONED, NEVER_STARTED)
    record = records.request_outcome(reservation, records.CONTROL, ending)
    if not await asyncio.to_thread(journal.log.has, record.kind, record.request_id):
        await journal.record(record)
    await database.run(lambda s: reservations.settle(s, reservation.lease, ending, time.time_ns()))


async def _ending(database: Database, intent: StoredRecord) -> Ending | None:
    lease = _lease(intent)
    return await database.run(lambda s: reservations.ending_of(s, lease)) if lease else None


def _lease(intent: StoredRecord) -> str:
    """The lease that an intent is about; empty for an operator's change."""
    lease = intent.facts.get("lease")
    return lease if intent.kind == records.REQUEST and isinstance(lease, str) else ""
