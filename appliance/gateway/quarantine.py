"""Requests that were in the engine when it died: the first time suspected, alone when it happens again convicted.

A request is known by its fingerprint: owner, model digest, prompt tokens, and the parameters that reach the
engine, a seed among them only where the client chose it. So what a client sends again under a new id is known
again, the same text of another tenant is not, and neither is it once another model answers to the alias.

Whatever a worker had not ended when it died has one strike and is a suspect. Of a deployment's suspects one at a
time is let in, beside requests that are not suspected: when the worker dies again, the suspect it had is convicted
and refused for an hour. A suspect that the engine brings to its end is cleared.

What this cannot tell apart: a worker that is killed for another reason twice while the same request is tried as
the suspect both times convicts it all the same, until the hour has passed. A worker that drains convicts nobody.
Everything is in memory: a gateway that starts anew suspects nobody.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import grpc

from appliance.errors import CloisterError
from engine.protos import engine_pb2

TERM_S = 3600.0
"""Seconds from the last strike until a suspect is cleared, and a convict let in again."""
WAIT_S = 10.0
"""Seconds a suspect waits for its turn at most."""
_MOST_MARKS = 4096

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Mark:
    """A fingerprint with a strike: until when, and whether it is convicted."""

    until: float
    convicted: bool = False


@dataclass(slots=True)
class _Trial:
    """The one place of a deployment's suspects, and how many are on it or wait for it."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    concerned: int = 0


class Quarantine:
    """What is known against requests.

    Args:
        monotonic: the clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._marks: OrderedDict[bytes, _Mark] = OrderedDict()
        self._trials: dict[str, _Trial] = {}

    async def enter(self, deployment: str, fingerprint: bytes) -> "Passage":
        """Let a request in, a suspect when its turn comes; the passage must be ended.

        Raises:
            CloisterError: REQUEST_QUARANTINED; or ENGINE_SUSPECTS_BUSY, its turn did not come in time.
        """
        if self._known(fingerprint) is None:
            return Passage(self, fingerprint, None)
        trial = self._trials.setdefault(deployment, _Trial())
        trial.concerned += 1
        try:
            async with asyncio.timeout(WAIT_S):
                await trial.turn.acquire()
        except BaseException as error:
            self._left(deployment, trial)
            if isinstance(error, TimeoutError):
                raise _suspects_busy() from None
            raise
        return self._tried(deployment, trial, fingerprint)

    def strike(self, fingerprint: bytes, on_trial: bool) -> None:
        """The worker died over a request."""
        mark = self._marks.pop(fingerprint, None) or _Mark(0.0)
        mark.until = self._monotonic() + TERM_S
        mark.convicted = mark.convicted or on_trial
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

    def _tried(self, deployment: str, trial: _Trial, fingerprint: bytes) -> "Passage":
        """The passage of one whose turn it is, unless it was convicted, or cleared, while it waited."""

        def leave() -> None:
            trial.turn.release()
            self._left(deployment, trial)

        try:
            mark = self._known(fingerprint)
        except CloisterError:
            leave()
            raise
        if mark is None:
            leave()
            return Passage(self, fingerprint, None)
        return Passage(self, fingerprint, leave)

    def _known(self, fingerprint: bytes) -> _Mark | None:
        """What is held against a request at present.

        Raises:
            CloisterError: REQUEST_QUARANTINED.
        """
        mark = self._marks.get(fingerprint)
        if mark is not None and mark.until <= self._monotonic():
            del self._marks[fingerprint]
            return None
        if mark is not None and mark.convicted:
            raise _quarantined()
        return mark

    def _left(self, deployment: str, trial: _Trial) -> None:
        trial.concerned -= 1
        if not trial.concerned:
            del self._trials[deployment]


class Passage:
    """One request's stay in the engine, ended exactly once; a further end does nothing.

    Args:
        quarantine: what the end is told to.
        fingerprint: the request's.
        leave: gives a suspect's place free; None for a request that is not suspected.
    """

    __slots__ = ("_fingerprint", "_leave", "_over", "_quarantine")

    def __init__(self, quarantine: Quarantine, fingerprint: bytes, leave: Callable[[], None] | None) -> None:
        self._quarantine = quarantine
        self._fingerprint = fingerprint
        self._leave = leave
        self._over = False

    def died(self) -> None:
        """The worker died before it had ended the request."""
        if not self._over:
            self._quarantine.strike(self._fingerprint, on_trial=self._leave is not None)
            self.left()

    def survived(self) -> None:
        """The engine answered to the end."""
        if not self._over:
            self._quarantine.clear(self._fingerprint)
            self.left()

    def left(self) -> None:
        """The request is no longer in the engine, and that proves nothing."""
        if not self._over:
            self._over = True
            if self._leave is not None:
                self._leave()


def fingerprint_of(model_digest: str, submit: engine_pb2.Submit, seed_given: bool) -> bytes:
    """SHA-256 of what makes two requests the same to the engine.

    Args:
        model_digest: of the model behind the alias.
        submit: the request, without handle, salt and weight.
        seed_given: the client chose the seed.
    """
    seed = submit.seed
    if not seed_given:
        submit.seed = 0
    material = submit.SerializeToString(deterministic=True)
    submit.seed = seed
    return hashlib.sha256(model_digest.encode() + b"\0" + bytes([seed_given]) + material).digest()


def _facts(fingerprint: bytes) -> dict[str, str]:
    return {"fingerprint": fingerprint.hex()[:16]}


def _quarantined() -> CloisterError:
    return CloisterError(
        "REQUEST_QUARANTINED",
        "the model's engine died over this very request twice; it is not tried again within the hour. Change the "
        "request, and tell the appliance's operator",
        grpc.StatusCode.FAILED_PRECONDITION,
    )


def _suspects_busy() -> CloisterError:
    return CloisterError(
        "ENGINE_SUSPECTS_BUSY",
        "the model's engine died while it had this request, perhaps among others; such requests are tried one "
        "at a time, and another is at present; try again",
        grpc.StatusCode.UNAVAILABLE,
        retry_after=timedelta(seconds=2),
    )
