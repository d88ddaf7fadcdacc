"""Open leases: each is settled exactly once, by the gateway that holds it or, when that is gone, by control.

A gateway proves to be alive by its heartbeat, which names the leases it walks. The leases of one that is silent
for five seconds, or whose address a new gateway has taken over, are settled as abandoned: all that was reserved is
charged, the record says why, and a gateway that names one of them later hears that it is closed. So is a lease
that its gateway does not name for as long: the answer to Admit was lost, or an earlier control opened it.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc

from appliance.control import records
from appliance.control.admission import reservations
from appliance.control.admission.reservations import ABANDONED, NEVER_STARTED, Ending, Reservation
from appliance.control.audit.record import Receipt
from appliance.control.db.database import Database
from appliance.control.journal import Journal
from appliance.errors import CloisterError

SILENCE_S = 5.0
_REMEMBERED = 8192

log = logging.getLogger(__name__)


@dataclass
class Lease:
    """A reservation in force, and how far its records are.

    Attributes:
        seen: when it was opened, or when its gateway named it last, seconds.
        outcome: the outcome record on its way; no other is appended while this one may still become durable.
        size_before: of the log, when that record was appended.
    """

    reservation: Reservation
    identity: str
    gateway_id: str
    intent: "Future[Receipt]"
    seen: float
    outcome: "Future[Receipt] | None" = None
    size_before: int = 0
    ending: Ending | None = None
    settlement: "asyncio.Task[Receipt] | None" = None

    @property
    def tokens(self) -> int:
        """Tokens reserved."""
        return self.reservation.size.prompt_tokens + self.reservation.size.max_tokens


@dataclass
class _Gateway:
    address: str
    heard: float
    leases: set[str] = field(default_factory=set)


class LeaseBook:
    """All open leases, and the gateways that hold them.

    Args:
        database: control.db.
        journal: the audit log.
        monotonic: the clock, seconds.

    Attributes:
        idle: set while no lease is open.
    """

    def __init__(
        self, database: Database, journal: Journal, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._journal = journal
        self._monotonic = monotonic
        self._leases: dict[str, Lease] = {}
        self._closed: OrderedDict[str, tuple[Ending, Receipt]] = OrderedDict()
        self._gateways: dict[str, _Gateway] = {}
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def open_leases(self) -> int:
        """Requests admitted and not settled."""
        return len(self._leases)

    @property
    def reserved_tokens(self) -> int:
        """Tokens they may still use."""
        return sum(lease.tokens for lease in self._leases.values())

    @property
    def gateway_address(self) -> str:
        """Where the gateway heard last listens; empty while none is up."""
        heard = [g for g in self._gateways.values() if g.address and not self._is_silent(g)]
        return max(heard, key=lambda g: g.heard).address if heard else ""

    def open(self, reservation: Reservation, identity: str, gateway_id: str, intent: "Future[Receipt]") -> None:
        """Put a reservation in force."""
        lease = Lease(reservation, identity, gateway_id, intent, self._monotonic())
        self._leases[reservation.lease] = lease
        self.idle.clear()
        self._hear(gateway_id).leases.add(reservation.lease)

    def keep(self, reservation: Reservation, identity: str, gateway_id: str, intent: Receipt) -> None:
        """Hold a lease that the control before this one opened, until its gateway claims it or the time is up."""
        durable: Future[Receipt] = Future()
        durable.set_result(intent)
        lease = Lease(reservation, identity, gateway_id, durable, self._monotonic())
        self._leases[reservation.lease] = lease
        self.idle.clear()

    async def await_intent(self, name: str) -> Receipt:
        """The receipt of a lease's intent, once durable.

        Raises:
            CloisterError: LEASE_UNKNOWN, AUDIT_BLOCKED.
        """
        return await self._journal.durable(self._find(name).intent)

    async def settle(self, name: str, ending: Ending) -> Receipt:
        """Close a lease; the receipt of its outcome once durable. A repetition is answered as the first time.

        Raises:
            CloisterError: LEASE_UNKNOWN, LEASE_ABANDONED, AUDIT_BLOCKED.
        """
        if name in self._closed:
            first, receipt = self._closed[name]
            _check_same(first, ending)
            return receipt
        lease = self._find(name)
        if lease.ending is None:
            lease.ending = ending
        _check_same(lease.ending, ending)
        if lease.settlement is None:
            lease.settlement = asyncio.create_task(self._settle(lease, lease.ending))
        return await asyncio.shield(lease.settlement)

    async def heartbeat(self, gateway_id: str, address: str, held: Sequence[str] = ()) -> list[str]:
        """A gateway lives; one that had its address before does not. Which of the leases it holds are closed."""
        gone = [i for i, g in self._gateways.items() if g.address == address and i != gateway_id and address]
        self._hear(gateway_id).address = address
        closed = [name for name in held if not self._claim(gateway_id, name)]
        for other in gone:
            await self._abandon(other, "GATEWAY_REPLACED")
        return closed

    async def sweep(self) -> None:
        """Abandon what silent gateways hold and nobody claims, and try again what could not be recorded before."""
        for gateway_id, gateway in list(self._gateways.items()):
            if self._is_silent(gateway):
                await self._abandon(gateway_id, "GATEWAY_SILENT")
        late = self._monotonic() - SILENCE_S
        await self._abandon_leases([lease for lease in self._leases.values() if lease.seen < late], "UNCLAIMED")
        stuck = [lease for lease in self._leases.values() if lease.ending and not lease.settlement]
        await self._settle_all([(lease, lease.ending) for lease in stuck if lease.ending])

    async def abandon_all(self, reason: str) -> None:
        """Settle everything that is open, at the end of control's life."""
        await self._abandon_leases(list(self._leases.values()), reason)

    async def _abandon(self, gateway_id: str, reason: str) -> None:
        gateway = self._gateways.pop(gateway_id, None)
        if gateway is not None:  # a sweep and a heartbeat may find the same one gone
            held = [self._leases[name] for name in sorted(gateway.leases) if name in self._leases]
            await self._abandon_leases(held, reason)

    async def _abandon_leases(self, leases: list[Lease], reason: str) -> None:
        endings = [(lease, _abandoned(lease, reason)) for lease in leases if not lease.ending]
        if endings:
            log.warning("leases abandoned", extra={"count": len(endings), "reason": reason})
        await self._settle_all(endings)

    async def _settle_all(self, endings: list[tuple[Lease, Ending]]) -> None:
        settled = (self.settle(lease.reservation.lease, ending) for lease, ending in endings)
        for result in await asyncio.gather(*settled, return_exceptions=True):
            if isinstance(result, BaseException):
                log.error("a lease could not be settled; it is tried again", extra={"error": str(result)})

    async def _settle(self, lease: Lease, ending: Ending) -> Receipt:
        """Ledger first, then the record: a crash in between is closed from the ledger at the next start."""
        name = lease.reservation.lease
        try:
            await self._database.run(lambda s: reservations.settle(s, name, ending, time.time_ns()))
            receipt = await self._record(lease, ending)
        except BaseException:
            lease.settlement = None
            raise
        self._forget(lease, ending, receipt)
        return receipt

    async def _record(self, lease: Lease, ending: Ending) -> Receipt:
        """The receipt of the outcome, appended once.

        What takes too long is waited for again; what failed is looked for in the log before it is appended anew,
        as a write that failed may have reached the disk.
        """
        actor = records.CONTROL if ending.outcome == ABANDONED else lease.identity
        record = records.request_outcome(lease.reservation, actor, ending)
        if lease.outcome is not None and _failed(lease.outcome):
            self._journal.check()
            found = await asyncio.to_thread(self._journal.recorded, record, lease.size_before)
            if found is not None:
                return found
            lease.outcome = None
        if lease.outcome is None:
            lease.size_before = self._journal.log.size
            lease.outcome = self._journal.begin(record)
        return await self._journal.durable(lease.outcome)

    def _claim(self, gateway_id: str, name: str) -> bool:
        """Whether a gateway may go on with a lease that it says it holds; one kept for it becomes its own."""
        if name in self._closed:  # settled by the gateway itself: its heartbeat and its Settle crossed
            return self._closed[name][0].outcome != ABANDONED
        lease = self._leases.get(name)
        if lease is None or lease.gateway_id != gateway_id or (lease.ending and lease.ending.outcome == ABANDONED):
            return False
        lease.seen = self._monotonic()
        self._gateways[gateway_id].leases.add(name)
        return True

    def _forget(self, lease: Lease, ending: Ending, receipt: Receipt) -> None:
        name = lease.reservation.lease
        self._leases.pop(name, None)
        if not self._leases:
            self.idle.set()
        if lease.gateway_id in self._gateways:
            self._gateways[lease.gateway_id].leases.discard(name)
        self._closed[name] = (ending, receipt)
        while len(self._closed) > _REMEMBERED:
            self._closed.popitem(last=False)

    def _find(self, name: str) -> Lease:
        lease = self._leases.get(name)
        if lease is None:
            raise CloisterError(
                "LEASE_UNKNOWN",
                "no open lease has this name; it was settled, long ago or by a control before this one",
                grpc.StatusCode.ABORTED,
            )
        return lease

    def _hear(self, gateway_id: str) -> _Gateway:
        gateway = self._gateways.setdefault(gateway_id, _Gateway("", 0.0))
        gateway.heard = self._monotonic()
        return gateway

    def _is_silent(self, gateway: _Gateway) -> bool:
        return self._monotonic() - gateway.heard > SILENCE_S


def _abandoned(lease: Lease, reason: str) -> Ending:
    """Charged is what was reserved, the most that can have been used; nothing where no token may have left."""
    if _failed(lease.intent):
        return Ending(ABANDONED, NEVER_STARTED)
    size = lease.reservation.size
    return Ending(ABANDONED, reason, size.prompt_tokens, size.max_tokens)


def _failed(record: "Future[Receipt]") -> bool:
    return record.done() and record.exception() is not None


def _check_same(first: Ending, again: Ending) -> None:
    """A gateway must not tell its client OK about a request that the ledger has as abandoned."""
    if first.outcome == ABANDONED and again.outcome != ABANDONED:
        raise CloisterError(
            "LEASE_ABANDONED",
            "the gateway was not heard of for too long and the request was settled as abandoned",
            grpc.StatusCode.ABORTED,
        )
