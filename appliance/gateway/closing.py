"""The end of a lease: whatever became of the request, the worker is told, what it computed asked, and settled."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from appliance.errors import CloisterError
from appliance.gateway.control import ControlClient
from appliance.gateway.neighbours import Neighbours
from appliance.gateway.rows import Rows
from appliance.gateway.sessions import Session
from appliance.protos import control_pb2

# After an abort, the worker's last word (what was computed) is waited for this long.
LAST_WORD_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Closing:
    """Ends a lease: tells the worker, asks what it computed, and settles.

    Attributes:
        rows: of each of the request's inputs.
    """

    near: Neighbours
    session: Session
    rows: Sequence[Rows]
    lease: str
    started: float

    async def completed(self, finish_reason: str) -> control_pb2.SettleResponse:
        """The client got all answers."""
        self.near.streams.discard(self.lease)
        return await self._settle(control_pb2.OUTCOME_COMPLETED, "", finish_reason)

    async def broken_off(
        self, outcome: control_pb2.Outcome.ValueType, reason: str
    ) -> control_pb2.SettleResponse | None:
        """The client did not get the whole answer; the engine is to forget the request first."""
        self.near.streams.discard(self.lease)
        for rows in self.rows:
            rows.abort()
        await asyncio.gather(*(rows.over(LAST_WORD_S) for rows in self.rows))
        for rows in self.rows:
            self.session.release(rows)
        try:
            return await self._settle(outcome, reason, "")
        except CloisterError as error:
            log.warning("lease not settled yet", extra={"code": error.code, "outcome": reason})
            return None

    async def _settle(
        self, outcome: control_pb2.Outcome.ValueType, reason: str, finish_reason: str
    ) -> control_pb2.SettleResponse:
        request = control_pb2.SettleRequest(
            lease=self.lease,
            outcome=outcome,
            reason=reason,
            prompt_tokens=sum(rows.computed_tokens for rows in self.rows),
            completion_tokens=sum(rows.completion_tokens for rows in self.rows),
            finish_reason=finish_reason,
        )
        duration = asyncio.get_running_loop().time() - self.started
        request.duration.FromTimedelta(timedelta(seconds=duration))
        return await self.near.control.settle(request)


async def settle_unwanted(
    control: ControlClient,
    admission: "asyncio.Task[control_pb2.AdmitResponse]",
    outcome: control_pb2.Outcome.ValueType,
    reason: str,
) -> None:
    """Close the lease of an admission whose call is gone, if it was granted."""
    try:
        admitted = await admission
    except CloisterError:
        return
    await control.settle(control_pb2.SettleRequest(lease=admitted.lease, outcome=outcome, reason=reason))
