"""One request on its way through the house: authorize, prepare, admit, submit, deliver, settle.

The order is the promise. No token leaves before the intent is durable, no OK before the outcome is, and a lease
that was obtained is settled whatever happens to the call, because settling runs outside of it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc

from appliance.errors import CloisterError
from appliance.gateway.background import Background
from appliance.gateway.closing import Closing, settle_unwanted
from appliance.gateway.control import ControlRefusalError
from appliance.gateway.events import answer_delta, completed, finished, prompt_deltas
from appliance.gateway.neighbours import Neighbours
from appliance.gateway.parameters import check_min_tokens
from appliance.gateway.quarantine import Passage, fingerprint_of
from appliance.gateway.rows import EngineGoneError, Rows, slow_client
from appliance.gateway.sessions import Session
from appliance.gateway.texts import engine_unavailable
from appliance.gateway.validation import CheckedRequest, check_length, room_for_answer
from appliance.protos import control_pb2
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

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

# Of a request's numbers the engine alone knows which tokens the model has; all others were checked before.
_ENGINE_FIELDS = {"INVALID_SAMPLING": "sampling.logit_bias"}

log = logging.getLogger(__name__)


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
        prompt = list(await near.texts.prepare(place.text_socket, place.scope, request.prompt))
        submit = self._submission(place, prompt)
        fingerprint = fingerprint_of(place.model_digest, submit, request.parameters.seed_given)
        passage = await near.quarantine.enter(place.deployment, place.scope, fingerprint)
        try:
            session = await near.sessions.open(place.worker_socket)
            started = self._now()
            admitted = await self._admit(place.ticket, submit)
        except BaseException:
            passage.left()
            raise
        rows = self._rows = self._submit(session, submit, admitted, passage)
        near.streams.add(admitted.lease, rows)
        closing = Closing(near, session, rows, admitted.lease, len(prompt), started)
        try:
            await self._deliver(admitted.lease, place.model_digest, len(prompt), rows)
        except asyncio.CancelledError:
            near.background.spawn(closing.broken_off(*self._why_interrupted()))
            raise
        except Exception as error:
            ended = self._ended(error)
            await _finished(near.background, closing.broken_off(self._outcome(ended), ended.code))
            raise ended from None
        settled = await _finished(near.background, closing.completed())
        return api.Receipt(
            request_id=request.request_id,
            audit_sequence=settled.audit_sequence,
            leaf_hash=settled.leaf_hash,
        )

    def _submission(self, place: control_pb2.AuthorizeResponse, prompt: list[int]) -> engine.Submit:
        """What the worker is to do, but for what control says when it admits it.

        Raises:
            CloisterError: CONTEXT_OVERFLOW, or INVALID_STOP.
        """
        parameters = self._request.parameters
        max_tokens = room_for_answer(parameters.max_tokens, len(prompt), place.max_context_tokens)
        check_min_tokens(parameters.stopping.min_tokens, max_tokens)
        return parameters.submission(place.scope, prompt, max_tokens)

    def _submit(
        self,
        session: Session,
        submit: engine.Submit,
        admitted: control_pb2.AdmitResponse,
        passage: Passage,
    ) -> Rows:
        submit.salt, submit.weight = admitted.salt, admitted.weight
        rows = session.submit(submit, passage)
        rows.interrupt = self._interrupt
        return rows

    async def _admit(self, ticket: str, submit: engine.Submit) -> control_pb2.AdmitResponse:
        """A lease; when the call is cancelled meanwhile, the lease that may still come is settled."""
        near, request = self._neighbours, self._request
        question = control_pb2.AdmitRequest(
            ticket=ticket,
            prompt_tokens=len(submit.token_ids),
            max_tokens=submit.max_tokens,
            prompt_sha256=request.prompt_sha256,
            parameters=request.parameters.recorded(submit.max_tokens),
            answers=submit.n,
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
            near.background.spawn(settle_unwanted(near.control, task, *self._why_interrupted()))
            raise
        self.admitted = True
        return admitted

    async def _deliver(self, lease: str, model_digest: str, prompt_tokens: int, rows: Rows) -> None:
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
            seed=self._request.parameters.seed,
        )
        await self._send(accepted)
        self._accepted = True
        left = self._request.parameters.n
        while True:
            await self._send_row(row)
            if row.HasField("end"):
                await self._send_end(row)
                left -= 1
                if not left:
                    break
            row = await rows.next()
        await self._send(completed(rows.ends, prompt_tokens))

    async def _send_end(self, row: engine.Row) -> None:
        """One answer has ended: the client is told why, or the call ends with it."""
        if row.end.reason == engine.END_REASON_ERROR:
            raise _engine_error(row.end)
        if row.end.reason not in (engine.END_REASON_STOP, engine.END_REASON_LENGTH):
            raise EngineGoneError
        await self._send(finished(row.index, row.end))

    async def _send_row(self, row: engine.Row) -> None:
        parameters = self._request.parameters
        if parameters.prompt_logprobs is not None:
            for delta in prompt_deltas(row):
                await self._send(delta)
        if row.text or row.token_ids:
            await self._send(answer_delta(row, parameters.return_token_ids))

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


async def _finished(background: Background, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which goes on when the caller is cancelled."""
    return await asyncio.shield(background.spawn(work))


def _engine_error(end: engine.End) -> CloisterError:
    """The engine refused or failed this one request, and says why in words that hold nothing of it."""
    return CloisterError(
        end.error_reason or "ENGINE_ERROR",
        end.error_message or "the engine failed this request; tell the appliance's operator",
        _ENGINE_REFUSALS.get(end.error_reason, grpc.StatusCode.INTERNAL),
        field=_ENGINE_FIELDS.get(end.error_reason),
    )
