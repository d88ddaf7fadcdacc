"""ControlService: what the gateway asks. Every refusal it gives is in the audit log before it is given."""

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

import grpc

from appliance import policy
from appliance.control import records
from appliance.control.admission import reservations
from appliance.control.admission.leases import LeaseBook
from appliance.control.admission.reservations import Ending, Size
from appliance.control.admission.tickets import Ticket, TicketBook
from appliance.control.admission.visibility import VisibleModel, check_capability, visible_model, visible_models
from appliance.control.db.database import Database
from appliance.control.deployments import Deployments
from appliance.control.identity.callers import CallerCheck, Principal, claimed_tenant
from appliance.control.identity.secret_keys import SecretKeys
from appliance.control.journal import Journal
from appliance.control.refusal import refuse
from appliance.errors import CloisterError
from appliance.protos import control_pb2, control_pb2_grpc

Answer = TypeVar("Answer")
_METHOD = re.compile(r"/[A-Za-z0-9_.]{1,120}/[A-Za-z0-9_]{1,80}")
_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_MOST_PARAMETERS = 32
_LONGEST_PARAMETER = 256
_SECOND = timedelta(seconds=1)

# grpc.aio gives servicers a context whose type the generated stubs keep private.
Context = Any


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Who, may they, can they, where, and the record of it.

    Args:
        database: control.db.
        journal: the audit log.
        keys: for scopes, salts and the prompt's HMAC.
        callers: checks certificates and keys.
        deployments: where models run.
        leases: open leases.
    """

    def __init__(
        self,
        database: Database,
        journal: Journal,
        keys: SecretKeys,
        callers: CallerCheck,
        deployments: Deployments,
        leases: LeaseBook,
    ) -> None:
        self._database = database
        self._journal = journal
        self._keys = keys
        self._callers = callers
        self._deployments = deployments
        self._leases = leases
        self._tickets = TicketBook()
        self._admitting: set[asyncio.Task[Any]] = set()
        self.draining = False

    async def Authorize(  # noqa: N802  # gRPC's name
        self, request: control_pb2.AuthorizeRequest, context: Context
    ) -> control_pb2.AuthorizeResponse:
        """Identity, key, policy and visibility; where the model runs."""

        async def answer() -> control_pb2.AuthorizeResponse:
            self._check_open()
            rule = policy.rule_for(request.method, policy.Audience.TENANT)
            request_id = _uuid(request.request_id)
            principal, model = await self._database.run(
                lambda s: _authorize(s, self._callers, request.caller, request.model)
            )
            place = self._place(principal, model, rule.capability)
            if rule.audit is policy.AuditClass.REQUEST:
                place.ticket = self._ticket(request, request_id, principal, place)
            return place

        return await self._or_refuse(context, answer, request.caller, request.method, request.request_id)

    async def Admit(  # noqa: N802  # gRPC's name
        self, request: control_pb2.AdmitRequest, context: Context
    ) -> control_pb2.AdmitResponse:
        """One transaction reserves; the intent begins to commit."""
        ticket = await self._or_refuse(context, lambda: self._redeem(request.ticket), control_pb2.Caller(), "", "")
        principal = ticket.principal
        identity = self._callers.identity(principal)
        caller = control_pb2.Caller(identity=identity, certificate_sha256=principal.certificate_sha256)
        return await self._or_refuse(
            context,
            lambda: self._whole(self._admit(ticket, identity, request)),
            caller,
            ticket.method,
            ticket.request_id,
        )

    async def AwaitIntent(  # noqa: N802  # gRPC's name
        self, request: control_pb2.AwaitIntentRequest, context: Context
    ) -> control_pb2.AwaitIntentResponse:
        """Once the intent is durable."""
        try:
            receipt = await self._leases.await_intent(request.lease)
        except Exception as error:
            await refuse(context, error)
        return control_pb2.AwaitIntentResponse(audit_sequence=receipt.sequence)

    async def Settle(  # noqa: N802  # gRPC's name
        self, request: control_pb2.SettleRequest, context: Context
    ) -> control_pb2.SettleResponse:
        """Ledger, release, durable outcome."""
        try:
            receipt = await self._leases.settle(request.lease, _ending(request))
        except Exception as error:
            await refuse(context, error)
        return control_pb2.SettleResponse(audit_sequence=receipt.sequence, leaf_hash=receipt.leaf_hash)

    async def ListVisibleModels(  # noqa: N802  # gRPC's name
        self, request: control_pb2.ListVisibleModelsRequest, context: Context
    ) -> control_pb2.ListVisibleModelsResponse:
        """The models this caller may use."""

        async def answer() -> control_pb2.ListVisibleModelsResponse:
            policy.rule_for(request.method, policy.Audience.TENANT)
            models = await self._database.run(lambda s: _visible(s, self._callers, request.caller))
            return control_pb2.ListVisibleModelsResponse(models=map(self._describe, models))

        return await self._or_refuse(context, answer, request.caller, request.method, "")

    async def Heartbeat(  # noqa: N802  # gRPC's name
        self, request: control_pb2.HeartbeatRequest, context: Context
    ) -> control_pb2.HeartbeatResponse:
        """The gateway lives, and hears which of its requests must not go on."""
        try:
            closed = await self._leases.heartbeat(request.gateway_id, request.address, request.leases)
        except Exception as error:
            await refuse(context, error)
        return control_pb2.HeartbeatResponse(closed_leases=closed)

    async def RecordRefusal(  # noqa: N802  # gRPC's name
        self, request: control_pb2.RecordRefusalRequest, context: Context
    ) -> control_pb2.RecordRefusalResponse:
        """The gateway refused somebody by itself."""
        reason = request.reason if _REASON.fullmatch(request.reason) else "UNKNOWN"
        try:
            await self._record_refusal(
                request.caller, request.method, request.request_id, reason, max(1, request.count)
            )
        except Exception as error:
            await refuse(context, error)
        return control_pb2.RecordRefusalResponse()

    def _check_open(self) -> None:
        if self.draining:
            raise CloisterError(
                "DRAINING",
                "the appliance is being stopped; try again when it is back",
                grpc.StatusCode.UNAVAILABLE,
                retry_after=_SECOND,
            )
        self._journal.check()

    async def _redeem(self, ticket: str) -> Ticket:
        """Use a ticket up. Whose it was is not known when it is refused, so the record names nobody."""
        self._check_open()
        return self._tickets.take(ticket)

    def _ticket(
        self,
        request: control_pb2.AuthorizeRequest,
        request_id: str,
        principal: Principal,
        place: control_pb2.AuthorizeResponse,
    ) -> str:
        return self._tickets.issue(
            Ticket(
                principal=principal,
                method=request.method,
                request_id=request_id,
                gateway_id=request.gateway_id,
                model=request.model,
                deployment=place.deployment,
                model_digest=place.model_digest,
                max_context_tokens=place.max_context_tokens,
            )
        )

    def _place(self, principal: Principal, model: VisibleModel, capability: str) -> control_pb2.AuthorizeResponse:
        running = self._deployments.ready(model.deployment)
        check_capability(running.capabilities, capability)
        return control_pb2.AuthorizeResponse(
            deployment=model.deployment,
            text_socket=running.text_socket,
            worker_socket=running.worker_socket,
            model_digest=running.model_digest,
            max_context_tokens=running.max_context_tokens,
            scope=self._keys.scope(principal.tenant),
            max_concurrent=principal.max_concurrent,
        )

    async def _admit(
        self, ticket: Ticket, identity: str, request: control_pb2.AdmitRequest
    ) -> control_pb2.AdmitResponse:
        size = _size(ticket, request)
        reservations.check_size(size, ticket.max_context_tokens)
        admitted = records.Admitted(
            identity=identity,
            certificate_sha256=ticket.principal.certificate_sha256,
            method=ticket.method,
            prompt_mac=self._keys.prompt_mac(request.prompt_sha256),
            parameters=_parameters(request),
        )
        lease = secrets.token_urlsafe(16)
        reservation = await self._database.run(
            lambda s: reservations.reserve(s, ticket, size, lease, time.time_ns())
        )
        try:
            intent = self._journal.begin(records.request_intent(reservation, admitted))
        except Exception:
            unrecorded = Ending("refused", "INTERNAL")
            await self._database.run(lambda s: reservations.settle(s, lease, unrecorded, time.time_ns()))
            raise
        self._leases.open(reservation, identity, ticket.gateway_id, intent)
        return control_pb2.AdmitResponse(
            lease=lease,
            scope=self._keys.scope(reservation.tenant),
            salt=self._keys.cache_salt(reservation.tenant),
            weight=reservation.weight,
        )

    async def _whole(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Do all of `work`, even if the gateway hangs up: what was reserved must become a lease."""
        task = asyncio.create_task(work)
        self._admitting.add(task)
        task.add_done_callback(self._admitting.discard)
        return await asyncio.shield(task)

    async def _or_refuse(
        self,
        context: Context,
        answer: Callable[[], Awaitable[Answer]],
        caller: control_pb2.Caller,
        method: str,
        request_id: str,
    ) -> Answer:
        """What `answer` returns, or its refusal, recorded before it is given."""
        try:
            try:
                return await answer()
            except CloisterError as refusal:
                if refusal.code not in ("AUDIT_BLOCKED", "DRAINING"):
                    await self._record_refusal(caller, method, request_id, refusal.code)
                raise
        except Exception as error:
            await refuse(context, error)

    async def _record_refusal(
        self, caller: control_pb2.Caller, method: str, request_id: str, reason: str, count: int = 1
    ) -> None:
        """Text that came from outside is recorded only where it has the form it should have."""
        tenant = claimed_tenant(caller.identity) or ""
        facts: records.Facts = {
            "method": method if _METHOD.fullmatch(method) else "",
            "reason": reason,
            "certificate": caller.certificate_sha256[:32].hex(),
            "policy": policy.POLICY_VERSION,
            "count": count,
        }
        identity = caller.identity if tenant else ""
        known_id = request_id if _is_uuid(request_id) else ""
        await self._journal.record(records.request_refused(identity, tenant, known_id, facts))

    def _describe(self, model: VisibleModel) -> control_pb2.ListVisibleModelsResponse.Model:
        status = self._deployments.status(model.deployment)
        return control_pb2.ListVisibleModelsResponse.Model(
            name=model.alias,
            model_digest=model.model_digest,
            max_context_tokens=status.max_context_tokens,
            capabilities=status.capabilities,
            ready=self._deployments.is_ready(model.deployment),
        )


def _authorize(
    session: Any, callers: CallerCheck, caller: control_pb2.Caller, alias: str
) -> tuple[Principal, VisibleModel]:
    principal = callers.principal(session, caller)
    return principal, visible_model(session, principal.tenant, alias)


def _visible(session: Any, callers: CallerCheck, caller: control_pb2.Caller) -> list[VisibleModel]:
    return list(visible_models(session, callers.principal(session, caller).tenant))


def _size(ticket: Ticket, request: control_pb2.AdmitRequest) -> Size:
    """What the request asks for; tokens for an answer are what a method for generating has, and no other."""
    generates = policy.TABLE[ticket.method].capability in ("generate", "chat")
    if generates == bool(request.inputs):
        raise CloisterError(
            "INVALID_PARAMETERS", "inputs are of methods that generate nothing, and of all of those"
        )
    if request.inputs:
        return Size(request.prompt_tokens, request.max_tokens, inputs=request.inputs)
    answers = request.answers or 1
    return Size(request.prompt_tokens, answers * request.max_tokens, answers)


def _parameters(request: control_pb2.AdmitRequest) -> dict[str, str]:
    """The parameters as recorded; more or longer ones than any method has are a defect of the gateway."""
    texts = [text for pair in request.parameters.items() for text in pair]
    if len(request.parameters) > _MOST_PARAMETERS or any(len(text) > _LONGEST_PARAMETER for text in texts):
        raise CloisterError("INVALID_PARAMETERS", "too many or too long sampling parameters")
    return dict(request.parameters)


def _ending(request: control_pb2.SettleRequest) -> Ending:
    if request.outcome == control_pb2.OUTCOME_UNSPECIFIED:
        raise CloisterError("INVALID_OUTCOME", "how the request ended is missing", field="outcome")
    return Ending(
        outcome=control_pb2.Outcome.Name(request.outcome).removeprefix("OUTCOME_").lower(),
        reason=request.reason if _REASON.fullmatch(request.reason) else "",
        prompt_tokens=request.prompt_tokens,
        completion_tokens=request.completion_tokens,
        finish_reason=request.finish_reason if request.finish_reason in ("stop", "length") else "",
        duration_ns=max(0, request.duration.ToNanoseconds()),
    )


def _uuid(text: str) -> str:
    if not _is_uuid(text):
        raise CloisterError(
            "INVALID_REQUEST_ID", "request_id is not a UUID; leave it empty or send one", field="request_id"
        )
    return text.lower()


def _is_uuid(text: str) -> bool:
    try:
        return len(text) == 36 and str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False
