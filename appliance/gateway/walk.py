"""One request on its way through the house: authorize, prepare, admit, submit, deliver, settle.

The order is the promise. No token leaves before the intent is durable, no OK before the outcome is, and a lease
that was obtained is settled whatever happens to the call, because settling runs outside of it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import grpc

from appliance.errors import CloisterError
from appliance.gateway.background import Background
from appliance.gateway.control import ControlClient, ControlRefusalError
from appliance.gateway.events import completed, finish_name, finished
from appliance.gateway.limits import Limits
from appliance.gateway.rows import EngineGoneError, Rows, slow_client
from appliance.gateway.sessions import Session, Sessions
from appliance.gateway.slots import TenantSlots
from appliance.gateway.streams import Streams
from appliance.gateway.texts import Texts, engine_unavailable
from appliance.gateway.validation import CheckedRequest, check_length, room_for_answer
from appliance.protos import control_pb2
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

# After an abort, the worker's last word (what was computed) is waited for this long.
LAST_WORD_S = 1.0
# A client's deadline passes there a moment before it does here; a cancellation this close to it is the deadline.
_DEADLINE_SLACK_S = 0.25

T = TypeVar("T")
Event = api.Accepted | api.Delta | api.Finished | api.Completed

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

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The processes a request is walked through, and what all requests have in common."""

    control: ControlClient
    texts: Texts
    sessions: Sessions
    background: Background
    streams: Streams = field(default_factory=Streams)
    slots: TenantSlots = field(default_factory=TenantSlots)
    limits: Limits = field(default_factory=Limits)


class Walk:
    """One request.

    Args:
        neighbours: whom to ask.
        caller: who asks.
        method: full method name.
        request: what is asked.
        deadline: on the event loop's clock.
        send: writes one event to the client; waits while the client has no room.

    Attributes:
        admitted: the request's id is spent, or may be; the same request cannot be tried again.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        caller: control_pb2.Caller,
        method: str,
        request: CheckedRequest,
        deadline: float,
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        self.admitted = False
        self._accepted = False
        self._neighbours = neighbours
        self._caller = caller
        self._method = method
        self._request = request
        self._deadline = deadline
        self._send_event = send
        self._clock = asyncio.timeout_at(deadline)
        self._rows: Rows | None = None

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
        request = self._request
        return await self._neighbours.control.authorize(
            self._caller, self._method, request.model, request.request_id
        )

    async def _walk_from(self, place: control_pb2.AuthorizeResponse) -> api.Receipt:
        with self._neighbours.slots.slot(place.scope, place.max_concurrent):
            check_length(self._request.prompt, place.max_context_tokens)
            return await self._walk_through(place)

    async def _walk_through(self, place: control_pb2.AuthorizeResponse) -> api.Receipt:
        near, request = self._neighbours, self._request
        prompt = list(await near.texts.prepare(place.text_socket, request.prompt))
        max_tokens = room_for_answer(request.max_tokens, len(prompt), place.max_context_tokens)
        session = await near.sessions.open(place.worker_socket)
        admitted = await self._admit(place.ticket, len(prompt), max_tokens)
        started = self._now()
        rows = self._rows = session.submit(self._submission(admitted, prompt, max_tokens))
        rows.interrupt = self._interrupt
        near.streams.add(admitted.lease, rows)
        closing = _Closing(near, session, rows, admitted.lease, len(prompt), started)
        try:
            end = await self._deliver(admitted.lease, place.model_digest, len(prompt), rows)
        except asyncio.CancelledError:
            near.background.spawn(closing.broken_off(*self._why_interrupted()))
            raise
        except Exception as error:
            ended = self._ended(error)
            await _finished(near.background, closing.broken_off(self._outcome(ended), ended.code))
            raise ended from None
        settled = await _finished(near.background, closing.completed(end))
        return api.Receipt(
            request_id=request.request_id,
            audit_sequence=settled.audit_sequence,
            leaf_hash=settled.leaf_hash,
        )

    async def _admit(self, ticket: str, prompt_tokens: int, max_tokens: int) -> control_pb2.AdmitResponse:
        """A lease; when the call is cancelled meanwhile, the lease that may still come is settled."""
        near, request = self._neighbours, self._request
        question = control_pb2.AdmitRequest(
            ticket=ticket,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            prompt_sha256=request.prompt_sha256,
            parameters=request.parameters(max_tokens),
        )
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
            near.background.spawn(_settle_unwanted(near.control, task, *self._why_interrupted()))
            raise
        self.admitted = True
        return admitted

    def _submission(
        self, admitted: control_pb2.AdmitResponse, prompt: list[int], max_tokens: int
    ) -> engine.Submit:
        request = self._request
        return engine.Submit(
            scope=admitted.scope,
            salt=admitted.salt,
            weight=admitted.weight,
            token_ids=prompt,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            max_tokens=max_tokens,
            stop=request.stopping.stop,
            stop_token_ids=request.stopping.stop_token_ids,
            include_stop=request.stopping.include_stop,
            ignore_eos=request.stopping.ignore_eos,
        )

    async def _deliver(self, lease: str, model_digest: str, prompt_tokens: int, rows: Rows) -> engine.End:
        """Write everything to the client, the last event included.

        `Accepted` waits for the worker's first row too: what comes after it is never a refusal.
        """
        await self._neighbours.control.await_intent(lease)
        row = await rows.next()
        if row.end.reason == engine.END_REASON_ERROR:
            raise _engine_error(row.end)
        accepted = api.Accepted(
            request_id=self._request.request_id,
            model_digest=model_digest,
            prompt_tokens=prompt_tokens,
            seed=self._request.seed,
        )
        await self._send(accepted)
        self._accepted = True
        await self._send_row(row)
        while not row.HasField("end"):
            row = await rows.next()
            await self._send_row(row)
        if row.end.reason == engine.END_REASON_ERROR:
            raise _engine_error(row.end)
        if row.end.reason not in (engine.END_REASON_STOP, engine.END_REASON_LENGTH):
            raise EngineGoneError
        await self._send(finished(row.end))
        await self._send(completed(row.end, prompt_tokens))
        return row.end

    async def _send_row(self, row: engine.Row) -> None:
        if row.text or row.token_ids:
            ids = row.token_ids if self._request.return_token_ids else ()
            await self._send(api.Delta(text=row.text, token_ids=ids))

    async def _send(self, event: Event) -> None:
        stall = asyncio.timeout(self._neighbours.limits.stall_seconds)
        try:
            async with stall:
                await self._send_event(event)
        except TimeoutError:
            raise slow_client() from None

    def _ended(self, error: Exception) -> CloisterError:
        """What the client is told about `error`."""
        if isinstance(error, CloisterError):
            return error
        if not isinstance(error, EngineGoneError):
            log.exception("request failed", extra={"request_id": self._request.request_id})
            return CloisterError(
                "INTERNAL", "the gateway failed; tell the appliance's operator", grpc.StatusCode.INTERNAL
            )
        if not self._accepted:
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
        if error.code in _ENGINE_REFUSALS and not self._accepted:
            return control_pb2.OUTCOME_REFUSED
        return control_pb2.OUTCOME_ENGINE_FAILED

    def _interrupt(self) -> None:
        """End the call now, whatever it waits for."""
        if not self._clock.expired():
            self._clock.reschedule(self._now())

    def _why_interrupted(self) -> tuple[control_pb2.Outcome.ValueType, str]:
        """Outcome and reason of a cancelled call: too slow a client, the deadline, or a client that went away."""
        if self._rows is not None and isinstance(self._rows.error, CloisterError):
            return control_pb2.OUTCOME_CANCELLED, self._rows.error.code
        if self._now() >= self._deadline - _DEADLINE_SLACK_S:
            return control_pb2.OUTCOME_DEADLINE, "DEADLINE_EXCEEDED"
        return control_pb2.OUTCOME_CANCELLED, "CANCELLED"

    def _interrupted(self) -> CloisterError:
        """What the client is told when this side gave up."""
        if self._rows is not None and isinstance(self._rows.error, CloisterError):
            return self._rows.error
        return CloisterError(
            "DEADLINE_EXCEEDED",
            "the answer was not complete at the request's deadline; allow more time or ask for fewer tokens",
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True)
class _Closing:
    """Ends a lease: tells the worker, asks what it computed, and settles."""

    near: Neighbours
    session: Session
    rows: Rows
    lease: str
    prompt_tokens: int
    started: float

    async def completed(self, end: engine.End) -> control_pb2.SettleResponse:
        """The client got the whole answer."""
        self.near.streams.discard(self.lease)
        return await self._settle(control_pb2.OUTCOME_COMPLETED, "", finish_name(end))

    async def broken_off(
        self, outcome: control_pb2.Outcome.ValueType, reason: str
    ) -> control_pb2.SettleResponse | None:
        """The client did not get the whole answer; the engine is to forget the request first."""
        self.near.streams.discard(self.lease)
        self.rows.abort()
        await self.rows.over(LAST_WORD_S)
        self.session.release(self.rows)
        try:
            return await self._settle(outcome, reason, "")
        except CloisterError as error:
            log.warning("lease not settled yet", extra={"code": error.code, "outcome": reason})
            return None

    async def _settle(
        self, outcome: control_pb2.Outcome.ValueType, reason: str, finish_reason: str
    ) -> control_pb2.SettleResponse:
        end, rows = self.rows.end, self.rows
        request = control_pb2.SettleRequest(
            lease=self.lease,
            outcome=outcome,
            reason=reason,
            prompt_tokens=end.prompt_tokens if end else self.prompt_tokens if rows.completion_tokens else 0,
            completion_tokens=end.completion_tokens if end else rows.completion_tokens,
            finish_reason=finish_reason,
        )
        duration = asyncio.get_running_loop().time() - self.started
        request.duration.FromTimedelta(timedelta(seconds=duration))
        return await self.near.control.settle(request)


async def _finished(background: Background, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which goes on when the caller is cancelled."""
    return await asyncio.shield(background.spawn(work))


async def _settle_unwanted(
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


def _engine_error(end: engine.End) -> CloisterError:
    """The engine refused or failed this one request, and says why in words that hold nothing of it."""
    return CloisterError(
        end.error_reason or "ENGINE_ERROR",
        end.error_message or "the engine failed this request; tell the appliance's operator",
        _ENGINE_REFUSALS.get(end.error_reason, grpc.StatusCode.INTERNAL),
    )
