"""Requests that were in the engine when it died: the first time suspected, tried, convicted when it happens again.

A request is known by its fingerprint: owner, model digest, prompt tokens, and the parameters that reach the
engine, a seed among them only where the client chose it. So what a client sends again under a new id is known
again, the same text of another tenant is not, and neither is it once another model answers to the alias.

Whatever a worker had not ended when it died has a strike and is a suspect. Suspects are tried beside requests
that are not suspected, one at a time of each tenant and deployment, so that no tenant waits for another. When the
worker dies again, the one suspect it had is convicted and refused for an hour. Where it had several, each has a
second strike; such ones take turns in the whole deployment besides, and are convicted when it dies once more. A
suspect that the engine brings to its end is cleared.

A place is held for `HOLD_S` of answering at the most; who takes longer goes on beside the next. So a long answer
keeps nobody waiting, and a worker that hangs, because it answers nothing, is given no further suspect.

What this cannot tell apart: a worker that is killed for another reason twice while the same request is tried as
the only suspect both times convicts it all the same, until the hour has passed. A worker that drains convicts
nobody. Everything is in memory: a gateway that starts anew suspects nobody.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import grpc

from appliance.errors import CloisterError
from appliance.gateway.places import Places
from engine.protos import engine_pb2

TERM_S = 3600.0
"""Seconds from the last strike until a suspect is cleared, and a convict let in again."""
WAIT_S = 10.0
"""Seconds a suspect waits for its turn at most."""
HOLD_S = 4.0
"""Seconds from a suspect's first row until the next one may begin beside it."""
_MOST_MARKS = 4096

_Where = tuple[str, str]  # deployment, and scope: of the place of a tenant's suspects; "" is the deployment's own

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Mark:
    """What is held against a fingerprint, and until when."""

    until: float = 0.0
    strikes: int = 0
    convicted: bool = False


class Quarantine:
    """What is known against requests.

    Args:
        monotonic: the clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._marks: OrderedDict[bytes, _Mark] = OrderedDict()
        self._places = Places(1)

    async def enter(self, deployment: str, scope: str, fingerprint: bytes) -> "Passage":
        """Let a request in, a suspect when its turn comes; the passage must be ended.

        Raises:
            CloisterError: REQUEST_QUARANTINED; or ENGINE_SUSPECTS_BUSY, its turn did not come in time.
        """
        passage = Passage(self, fingerprint)
        try:
            async with asyncio.timeout(WAIT_S):
                for strikes, where in ((1, (deployment, scope)), (2, (deployment, ""))):
                    if self._strikes(fingerprint) >= strikes:
                        await self._places.take(where)
                        passage.held.append(where)
            passage.strikes = self._strikes(fingerprint)  # it was convicted, or cleared, while it waited
        except BaseException as error:
            passage.left()
            if isinstance(error, TimeoutError):
                raise _suspects_busy() from None
            raise
        if not passage.strikes:
            passage.give_way()
        return passage

    def now(self) -> float:
        """The clock, seconds."""
        return self._monotonic()

    def strike(self, fingerprint: bytes, strikes: int, convicted: bool) -> None:
        """The worker died over a request, which has `strikes` now."""
        mark = self._marks.pop(fingerprint, None) or _Mark()
        mark.until = self._monotonic() + TERM_S
        mark.strikes = max(mark.strikes, strikes)
        mark.convicted = mark.convicted or convicted
        self._marks[fingerprint] = mark
        while len(self._marks) > _MOST_MARKS:
            self._marks.popitem(last=False)
        log.warning("request quarantined" if mark.convicted else "request suspected", extra=_facts(fingerprint))

    def clear(self, fingerprint: bytes) -> None:
        """The engine brought a request to its end."""
        mark = self._marks.get(fingerprint)
        if mark is not None and not mark.convicted:
            del self._marks[fingerprint]
            log.info("suspect cleared", extra=_facts(fingerprint))

    def give_back(self, where: _Where) -> None:
        """A place is free for the next."""
        self._places.give_back(where)

    def _strikes(self, fingerprint: bytes) -> int:
        """How often the worker has died over a request, of late.

        Raises:
            CloisterError: REQUEST_QUARANTINED.
        """
        mark = self._marks.get(fingerprint)
        if mark is None:
            return 0
        if mark.until <= self._monotonic():
            del self._marks[fingerprint]
            return 0
        if mark.convicted:
            raise _quarantined()
        return mark.strikes


class Passage:
    """One request's stay in the engine, ended exactly once; a further end does nothing.

    A request of many inputs has as many parts there and ends with the last; it is suspected, tried and cleared as
    a whole.

    Args:
        quarantine: what the end is told to.
        fingerprint: the request's.

    Attributes:
        strikes: it had when it was let in; one with any is a suspect.
        held: places of suspects that it has.
    """

    __slots__ = (
        *("_fingerprint", "_first_row", "_over", "_parts", "_quarantine", "_unproven"),
        *("held", "strikes"),
    )

    def __init__(self, quarantine: Quarantine, fingerprint: bytes) -> None:
        self.strikes = 0
        self.held: list[_Where] = []
        self._quarantine = quarantine
        self._fingerprint = fingerprint
        self._first_row: float | None = None
        self._over = False
        self._parts = 1
        self._unproven = False

    def divide(self, parts: int) -> None:
        """The request has so many parts, which end each by itself; at least one."""
        self._parts = parts

    def answered(self) -> None:
        """A row came: the worker does not hang over it; the next suspect may begin when this one had its time."""
        if not self.held:
            return
        now = self._quarantine.now()
        if self._first_row is None:
            self._first_row = now
        if now - self._first_row >= HOLD_S:
            self.give_way()

    def survived(self) -> None:
        """The engine answered a part to its end; with the last, the request is cleared if that is so of all."""
        self._end_part(proven=True)

    def left(self) -> None:
        """A part is no longer in the engine, and that proves nothing."""
        self._end_part(proven=False)

    def _end_part(self, *, proven: bool) -> None:
        self._parts -= 1
        self._unproven = self._unproven or not proven
        if self._parts > 0 or self._over:
            return
        if not self._unproven:
            self._quarantine.clear(self._fingerprint)
        self._end()

    def _end(self) -> None:
        self._over = True
        self.give_way()

    def give_way(self) -> None:
        """Leave the places of suspects to others."""
        held, self.held = self.held, []
        for where in held:
            self._quarantine.give_back(where)

    @staticmethod
    def died(passages: Iterable["Passage"]) -> None:
        """One worker died before it had ended these requests, or parts of them."""
        there = [passage for passage in dict.fromkeys(passages) if not passage._over]
        alone = len({passage._fingerprint for passage in there if passage.strikes}) == 1
        for passage in there:
            convicted = passage.strikes > 1 or (passage.strikes == 1 and alone)
            passage._quarantine.strike(passage._fingerprint, passage.strikes + 1, convicted)
            passage._end()


def fingerprint_of(model_digest: str, submits: Sequence[engine_pb2.Submit], seed_given: bool) -> bytes:
    """SHA-256 of what makes two requests the same to the engine.

    Args:
        model_digest: of the model behind the alias.
        submits: the request, of many inputs each of them, without handle, salt and weight.
        seed_given: the client chose the seed.
    """
    known = hashlib.sha256(model_digest.encode() + b"\0" + bytes([seed_given]))
    for submit in submits:
        seed = submit.seed
        if not seed_given:
            submit.seed = 0
        material = submit.SerializeToString(deterministic=True)
        submit.seed = seed
        known.update(len(material).to_bytes(8, "big") + material)
    return known.digest()


def _facts(fingerprint: bytes) -> dict[str, str]:
    return {"fingerprint": fingerprint.hex()[:16]}


def _quarantined() -> CloisterError:
    return CloisterError(
        "REQUEST_QUARANTINED",
        "the model's engine died over this very request more than once; it is not tried again within the hour. "
        "Change the request, and tell the appliance's operator",
        grpc.StatusCode.FAILED_PRECONDITION,
    )


def _suspects_busy() -> CloisterError:
    return CloisterError(
        "ENGINE_SUSPECTS_BUSY",
        "the model's engine died while it had this request, perhaps among others; such requests are tried one "
        "after the other, and others are at present; try again",
        grpc.StatusCode.UNAVAILABLE,
        retry_after=timedelta(seconds=2),
    )
