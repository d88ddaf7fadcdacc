"""The gateway's own refusals on record: the first of a kind at once, those alike within a second as one, counted.

A kind is a certificate and a code. None is dropped: what control does not take now is counted and offered again,
and what is left when the gateway ends goes, with its count, to the log. An offer that was not answered in time may
have been taken all the same, so a count can be too high, never too low. Beyond `MAX_KINDS` kinds at once, further
certificates share one entry for each code, which names none of them; the codes are the program's own, so few.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from appliance.gateway.control import ControlClient
from appliance.protos import control_pb2

MAX_KINDS = 1024
INTERVAL_S = 1.0
# Longer than any method that has a row; control records none that is longer.
_MAX_METHOD = 256

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Kind:
    """Refusals of one kind: how many are not on record, the latest of them, and whether the first was offered."""

    latest: control_pb2.RecordRefusalRequest
    count: int = 1
    offered: asyncio.Event = field(default_factory=asyncio.Event)
    keeper: asyncio.Task[None] | None = None


class Refusals:
    """Puts refusals on record.

    Args:
        control: keeps the record.
    """

    def __init__(self, control: ControlClient) -> None:
        self._control = control
        self._kinds: dict[tuple[bytes, str], _Kind] = {}

    @property
    def num_kinds(self) -> int:
        """Kinds that are remembered at present."""
        return len(self._kinds)

    async def record(self, caller: control_pb2.Caller, method: str, request_id: str, reason: str) -> None:
        """Put a refusal on record; returns once it is there, cannot be now, or is counted."""
        name, who = (caller.certificate_sha256, reason), caller
        if name not in self._kinds and len(self._kinds) >= MAX_KINDS:
            name, who, request_id = (b"", reason), control_pb2.Caller(), ""
        refusal = control_pb2.RecordRefusalRequest(
            caller=control_pb2.Caller(identity=who.identity, certificate_sha256=who.certificate_sha256),
            method=method[:_MAX_METHOD],
            request_id=request_id,
            reason=reason,
        )
        kind = self._kinds.get(name)
        if kind is not None:
            kind.count += 1
            kind.latest = refusal
            return
        kind = self._kinds[name] = _Kind(refusal)
        kind.keeper = asyncio.create_task(self._keep(name, kind))
        await kind.offered.wait()

    async def close(self) -> None:
        """Offer what is left once more, and log what control does not take."""
        keepers = [kind.keeper for kind in self._kinds.values() if kind.keeper]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        left = [kind for kind in self._kinds.values() if kind.count]
        self._kinds.clear()
        await asyncio.gather(*map(self._offer, left))
        for kind in left:
            if kind.count:
                certificate = kind.latest.caller.certificate_sha256.hex()
                facts = {"certificate": certificate, "reason": kind.latest.reason, "count": kind.count}
                log.error("refusals not recorded", extra=facts)

    async def _keep(self, name: tuple[bytes, str], kind: _Kind) -> None:
        """Offer what came meanwhile once a second, until nothing did."""
        while kind.count:
            try:
                await self._offer(kind)
            finally:
                kind.offered.set()
            await asyncio.sleep(INTERVAL_S)
        del self._kinds[name]

    async def _offer(self, kind: _Kind) -> None:
        request, count = kind.latest, kind.count
        request.count = count
        if count > 1:
            request.request_id = ""
        if await self._control.record_refusal(request):
            kind.count -= count
