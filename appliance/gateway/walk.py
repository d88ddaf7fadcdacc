"""One request on its way through the house: authorize, prepare, admit, submit, deliver, settle.

The order is the promise. Nothing the engine made leaves before the intent is durable, no OK before the outcome is,
and a lease that was obtained is settled whatever happens to the call, because settling runs outside of it. What is
prepared, submitted and delivered is a matter of the kind of request: `generation.py`, `gathering.py`.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import grpc

from appliance.errors import CloisterError
from appliance.gateway.background import Background
from appliance.gateway.closing import Closing, settle_unwanted
from appliance.gateway.control import ControlRefusalError
from appliance.gateway.neighbours import Neighbours
from appliance.gateway.quarantine import Passage
from appliance.gateway.rows import EngineGoneError, Rows
from appliance.gateway.sessions import Session
from appliance.gateway.texts import engine_unavailable
from appliance.gateway.validation import CheckedRequest
from appliance.protos import control_pb2
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

# A client's deadline passes there a moment before it does here; a cancellation this close to it is the deadline.
_DEADLINE_SLACK_S = 0.25

T = TypeVar("T")

# What the engine itself refuses; everything else it says is a failure.
_ENGINE_REFUSALS = {
    "CONTEXT_OVERFLOW": grpc.StatusCode.INVALID_ARGUMENT,
    "EMPTY_PROMPT": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_SAMPLING": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_STOP": grpc.StatusCode.INVALID_ARGUMENT,
    "TOKEN_OUT_OF_RANGE": grpc.StatusCode.INVALID_ARGUMENT,
    "KV_TOO_SMALL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "WORKER_DRAINING": grpc.StatusCode.UNAVAILABLE,
}
# And what is only seen to be refused once the engine has answered.
_LATE_REFUSALS = frozenset({"INVALID_DIMENSIONS"})

# Of a request's numbers the engine alone knows which tokens the model has; all others were checked before.
_ENGINE_FIELDS = {"INVALID_SAMPLING": "sampling.logit_bias"}

log = logging.getLogger(__name__)


class Walk(ABC):
    """One request.

    Args:
        neighbours: whom to ask.
        caller: who asks.
        method: full method name.
        request: what is asked.
        deadline: on the event loop's clock.

    Attributes:
        admitted: the request's id is spent, or may be; the same request cannot be tried again.
        begun: the client was told, or the engine has begun to answer; what ends the call now is no refusal.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        caller: control_pb2.Caller,
        method: str,
        request: CheckedRequest,
        deadline: float,
    ) -> None:
        self.admitted = False
        self.begun = False
        self.neighbours = neighbours
        self.request_id = request.request_id
        self._caller = caller
        self._method = method
        self._model = request.model
        self._deadline = deadline
        self._clock = asyncio.timeout_at(deadline)
        self._rows: Sequence[Rows] = ()

    @abstractmethod
    async def submissions(self, place: control_pb2.AuthorizeResponse) -> list[engine.Submit]:
        """What the worker is to do, but for what control says when it admits it; each gets rows of its own.

        Raises:
            CloisterError: the request cannot be done there.
        """

    @abstractmethod
    def fingerprint(self, place: control_pb2.AuthorizeResponse, submits: Sequence[engine.Submit]) -> bytes:
        """By what the request is known again."""

    @abstractmethod
    def question(self, submits: Sequence[engine.Submit]) -> control_pb2.AdmitRequest:
        """What control is asked to reserve, but for the ticket."""

    @abstractmethod
    async def deliver(self, place: control_pb2.AuthorizeResponse, rows: Sequence[Rows]) -> str:
        """Read the rows to their ends; the intent of the request is durable.

        Returns: why it ended, stop or length, as it is recorded; empty where nothing was generated.

        Raises:
            CloisterError, EngineGoneError: the request ends with it.
        """

    async def run(self) -> api.Receipt:
        """Walk; the receipt for the trailer.

        Raises:
            CloisterError: the refusal or failure that ends the call; any lease is being settled.
        """
        try:
            async with self._clock:
                return await self._walk()
        except TimeoutError:
            raise self._interrupted() from None

    async def _walk(self) -> api.Receipt:
        """A ticket that control no longer knows, because something took too long, is asked for once again."""
        try:
            return await self._walk_from(await self._authorize())
        except ControlRefusalError as refusal:
            if refusal.code != "TICKET_INVALID":
                raise
        return await self._walk_from(await self._authorize())

    async def _authorize(self) -> control_pb2.AuthorizeResponse:
        return await self.neighbours.control.authorize(self._caller, self._method, self._model, self.request_id)

    async def _walk_from(self, place: control_pb2.AuthorizeResponse) -> api.Receipt:
        near = self.neighbours
        with near.slots.slot(place.scope, place.max_concurrent):
            submits = await self.submissions(place)
            passage = await near.quarantine.enter(place.deployment, place.scope, self.fingerprint(place, submits))
            try:
                session = await near.sessions.open(place.worker_socket)
                started = self._now()
                admitted = await self._admit(place.ticket, submits)
            except BaseException:
                passage.left()
                raise
            rows = self._rows = self._submit(session, submits, admitted, passage)
            near.streams.add(admitted.lease, rows)
            return await self._answer(place, Closing(near, session, rows, admitted.lease, started))

    async def _answer(self, place: control_pb2.AuthorizeResponse, closing: Closing) -> api.Receipt:
        """Deliver, and settle however that ends."""
        near = self.neighbours
        try:
            await near.control.await_intent(closing.lease)
            reason = await self.deliver(place, closing.rows)
        except asyncio.CancelledError:
            near.background.spawn(closing.broken_off(*self._why_interrupted()))
            raise
        except Exception as error:
            ended = self._ended(error)
            await _finished(near.background, closing.broken_off(self._outcome(ended), ended.code))
            raise ended from None
        settled = await _finished(near.background, closing.completed(reason))
        return api.Receipt(
            request_id=self.request_id,
            audit_sequence=settled.audit_sequence,
            leaf_hash=settled.leaf_hash,
        )

    def _submit(
        self,
        session: Session,
        submits: Sequence[engine.Submit],
        admitted: control_pb2.AdmitResponse,
        passage: Passage,
    ) -> Sequence[Rows]:
        passage.divide(len(submits))
        for submit in submits:
            submit.salt, submit.weight = admitted.salt, admitted.weight
        rows = tuple(session.submit(submit, passage) for submit in submits)
        for one in rows:
            one.interrupt = self._interrupt
        return rows

    async def _admit(self, ticket: str, submits: Sequence[engine.Submit]) -> control_pb2.AdmitResponse:
        """A lease; when the call is cancelled meanwhile, the lease that may still come is settled."""
        near, question = self.neighbours, self.question(submits)
        question.ticket = ticket
        task = near.background.spawn(near.control.admit(question))
        try:
            admitted = await asyncio.shield(task)
        except ControlRefusalError:
            raise
        except CloisterError:
            self.admitted = True
            raise
        except asyncio.CancelledError:
            self.admitted = True
            near.background.spawn(settle_unwanted(near.control, task, *self._why_interrupted()))
            raise
        self.admitted = True
        return admitted

    def _ended(self, error: Exception) -> CloisterError:
        """What the client is told about `error`."""
        if isinstance(error, CloisterError):
            return error
        if not isinstance(error, EngineGoneError):
            log.exception("request failed", extra={"request_id": self.request_id})
            return CloisterError(
                "INTERNAL", "the gateway failed; tell the appliance's operator", grpc.StatusCode.INTERNAL
            )
        if not self.begun:
            return engine_unavailable()
        return CloisterError(
            "ENGINE_RESTARTED",
            "the model's engine ended while it answered; it is started again by itself, send the request again "
            "under a new id",
            grpc.StatusCode.ABORTED,
        )

    def _outcome(self, error: CloisterError) -> control_pb2.Outcome.ValueType:
        """How control records `error`."""
        if isinstance(error, ControlRefusalError) or error.code == "CONTROL_UNAVAILABLE":
            return control_pb2.OUTCOME_REFUSED
        if error.code in ("SLOW_CLIENT", "GATEWAY_STOPPING", "LEASE_CLOSED"):
            return control_pb2.OUTCOME_CANCELLED
        if error.code in _LATE_REFUSALS or (error.code in _ENGINE_REFUSALS and not self.begun):
            return control_pb2.OUTCOME_REFUSED
        return control_pb2.OUTCOME_ENGINE_FAILED

    def _interrupt(self) -> None:
        """End the call now, whatever it waits for."""
        if not self._clock.expired():
            self._clock.reschedule(self._now())

    def _cut_off(self) -> CloisterError | None:
        """Why this side gave the call up, if it did before the deadline."""
        errors = (one.error for one in self._rows)
        return next((error for error in errors if isinstance(error, CloisterError)), None)

    def _why_interrupted(self) -> tuple[control_pb2.Outcome.ValueType, str]:
        """Outcome and reason of a cancelled call: too slow a client, the deadline, or a client that went away."""
        error = self._cut_off()
        if error is not None:
            return control_pb2.OUTCOME_CANCELLED, error.code
        if self._now() >= self._deadline - _DEADLINE_SLACK_S:
            return control_pb2.OUTCOME_DEADLINE, "DEADLINE_EXCEEDED"
        return control_pb2.OUTCOME_CANCELLED, "CANCELLED"

    def _interrupted(self) -> CloisterError:
        """What the client is told when this side gave up."""
        return self._cut_off() or CloisterError(
            "DEADLINE_EXCEEDED",
            "the answer was not complete at the request's deadline; allow more time or ask for less",
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def _finished(background: Background, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which goes on when the caller is cancelled."""
    return await asyncio.shield(background.spawn(work))


def engine_error(end: engine.End, field: str | None = None) -> CloisterError:
    """The engine refused or failed this one request, and says why in words that hold nothing of it."""
    return CloisterError(
        end.error_reason or "ENGINE_ERROR",
        end.error_message or "the engine failed this request; tell the appliance's operator",
        _ENGINE_REFUSALS.get(end.error_reason, grpc.StatusCode.INTERNAL),
        field=_ENGINE_FIELDS.get(end.error_reason, field),
    )
