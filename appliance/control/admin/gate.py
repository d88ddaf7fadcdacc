"""The gate before every admin call: session, role, and the record; no service behind it can be reached otherwise.

A call whose row says `change` has its intent durable before it is carried out and its outcome before it is
answered. What the record holds of a request are its fields, and of bytes the SHA-256; no request of the admin
protocol carries a secret. Of answers only what a service says with `note` is recorded.
"""

import asyncio
import contextvars
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from appliance import policy
from appliance.control import records
from appliance.control.audit import Record
from appliance.control.audit.record import Json
from appliance.control.journal import Journal
from appliance.control.login import METADATA_KEY, LoggedIn, Sessions
from appliance.control.refusal import refuse
from appliance.errors import CloisterError
from appliance.policy import Audience, AuditClass

_LONGEST_ARGUMENT = 512
_MOST_ITEMS = 100

log = logging.getLogger(__name__)


@dataclass
class Action:
    """The call in progress: who makes it, and what its outcome will say."""

    operator: LoggedIn
    method: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    results: dict[str, Json] = field(default_factory=dict)


_current: contextvars.ContextVar[Action] = contextvars.ContextVar("action")

# grpc.aio's own types for handlers and contexts are private or untyped.
Context = Any
Handler = Any


def operator() -> str:
    """Name of the operator who makes the call in progress."""
    return _current.get().operator.name


def note(**facts: Json) -> None:
    """Add to what the outcome record of the call in progress will say; never a secret."""
    _current.get().results.update(facts)


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through when its policy row allows it to one of the operator's roles.

    Args:
        sessions: the sessions in force.
        journal: the audit log.
    """

    def __init__(self, sessions: Sessions, journal: Journal) -> None:
        self._sessions = sessions
        self._journal = journal
        self._late: set[asyncio.Task[None]] = set()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: Any
    ) -> Handler:
        """The handler of a call, behind the gate."""
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        token = next((str(v) for k, v in details.invocation_metadata or () if k == METADATA_KEY), "")
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, token, handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, token, handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _unary(self, method: str, token: str, serve: Callable[..., Awaitable[Message]]) -> Any:
        async def handler(request: Message, context: Context) -> Message:
            try:
                work = self._serve(method, token, request, lambda: serve(request, context))
                return await asyncio.shield(self._keep(work))
            except Exception as error:
                await refuse(context, error)

        return handler

    def _stream(self, method: str, token: str, serve: Callable[..., AsyncIterator[Message]]) -> Any:
        async def handler(request: Message, context: Context) -> AsyncIterator[Message]:
            try:
                action, rule = await self._enter_stream(method, token, request)
                async for message in self._relay(action, rule, serve(request, context)):
                    yield message
            except Exception as error:
                await refuse(context, error)

        return handler

    async def _enter(self, method: str, token: str, request: Message) -> tuple[Action, policy.Rule]:
        """Who calls, and the row that allows it; a refusal is recorded before it is given."""
        name = ""
        try:
            caller = self._sessions.operator(token)
            name = caller.name
            rule = policy.rule_for(method, Audience.OPERATOR)
            policy.check_role(rule, caller.roles)
        except CloisterError as refusal:
            facts: records.Facts = {"method": method, "reason": refusal.code, "policy": policy.POLICY_VERSION}
            await self._journal.note(records.operator_event("operator.refused", name, "deny", facts))
            raise
        action = Action(caller, method)
        facts = {"method": method, "policy": policy.POLICY_VERSION, "arguments": _arguments(request)}
        if rule.audit is AuditClass.CHANGE:
            await self._journal.record(records.change_intent(caller.name, action.id, facts))
        elif rule.audit is AuditClass.READ:
            await self._journal.note(records.operator_event("operator.read", caller.name, "allow", facts))
        return action, rule

    async def _serve(
        self, method: str, token: str, request: Message, work: Callable[[], Awaitable[Message]]
    ) -> Message:
        """A unary call from the gate to its outcome; a caller who leaves stops nothing half-way."""
        action, rule = await self._enter(method, token, request)
        _current.set(action)
        return await (self._change(action, work()) if rule.audit is AuditClass.CHANGE else work())

    async def _enter_stream(self, method: str, token: str, request: Message) -> tuple[Action, policy.Rule]:
        """Enter; when the caller leaves meanwhile, the intent that may get in is closed."""
        entering = self._keep(self._enter(method, token, request))
        try:
            action, rule = await asyncio.shield(entering)
        except asyncio.CancelledError:
            self._keep(self._close_unserved(entering))
            raise
        _current.set(action)
        return action, rule

    async def _close_unserved(self, entering: "asyncio.Task[tuple[Action, policy.Rule]]") -> None:
        try:
            action, rule = await entering
        except CloisterError:
            return
        if rule.audit is AuditClass.CHANGE:
            await self._record_late(_outcome(action, asyncio.CancelledError()))

    async def _change(self, action: Action, work: Awaitable[Message]) -> Message:
        try:
            answer = await work
        except BaseException as error:
            await self._journal.record(_outcome(action, error))
            raise
        await self._journal.record(_outcome(action, None))
        return answer

    async def _relay(
        self, action: Action, rule: policy.Rule, messages: AsyncIterator[Message]
    ) -> AsyncIterator[Message]:
        """The messages of a streaming call, its outcome recorded before the stream ends."""
        if rule.audit is not AuditClass.CHANGE:
            async for message in messages:
                yield message
            return
        ending: BaseException | None = asyncio.CancelledError()
        try:
            async for message in messages:
                yield message
            ending = None
        except CloisterError as error:
            ending = error
            raise
        finally:
            if isinstance(
                ending, asyncio.CancelledError
            ):  # the caller left: nobody waits, and nothing may await here
                self._keep(self._record_late(_outcome(action, ending)))
            else:
                await self._journal.record(_outcome(action, ending))

    async def _record_late(self, record: Record) -> None:
        try:
            await self._journal.record(record)
        except CloisterError as error:
            log.error(
                "an outcome is not recorded; the next start of control records it", extra={"code": error.code}
            )

    def _keep(self, work: Any) -> Any:
        """A task that lives on when its caller leaves."""
        task = asyncio.ensure_future(work)
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        return task


def _outcome(action: Action, error: BaseException | None) -> Record:
    facts: dict[str, Json] = {"method": action.method, **action.results}
    if error is None:
        decision = "done"
    elif isinstance(error, CloisterError):
        decision, facts["reason"] = "failed", error.code
    else:
        decision, facts["reason"] = "failed", "CANCELLED" if _left(error) else "INTERNAL"
    return records.change_outcome(action.operator.name, action.id, decision, facts)


def _left(error: BaseException) -> bool:
    return isinstance(error, asyncio.CancelledError)


def _arguments(message: Message) -> dict[str, Json]:
    """The fields of a request that are set, for the record."""
    return {descriptor.name: _fact(value) for descriptor, value in message.ListFields()}


def _fact(value: Any) -> Json:
    if isinstance(value, Message):
        return _arguments(value)
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, str):
        return value[:_LONGEST_ARGUMENT]
    if isinstance(value, bool | int):
        return value
    return [_fact(item) for item in list(value)[:_MOST_ITEMS]]
