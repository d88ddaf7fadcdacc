"""AuditService: operators with the auditor's role read the log and have it verified."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from appliance.control.admin.views import timestamp
from appliance.control.audit import AuditLog, StoredRecord
from appliance.control.audit.query import Filter
from appliance.control.audit.verification import verify
from appliance.control.home import Home
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, admin_pb2_grpc

_DEFAULT_LIMIT = 100
_AT_ONCE = 500
_MOST_IN_A_PAGE = 200
_LONGEST_FILTER = 1024
_HIGHEST = 2**63 - 1
_LOOK_AGAIN_S = 0.2

# grpc.aio gives servicers a context whose type the generated stubs keep private.
Context = Any


class AuditService(admin_pb2_grpc.AuditServiceServicer):
    """Reads the log, behind the gate; works while the log takes no records.

    Args:
        log: the open log.
        home: where its files lie, for verification.
    """

    def __init__(self, log: AuditLog, home: Home) -> None:
        self._log = log
        self._home = home

    async def TailAudit(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.TailAuditRequest, context: Context
    ) -> AsyncIterator[admin_pb2.TailAuditResponse]:
        """Records after a sequence number; with `follow`, then new ones until the caller leaves."""
        left = request.limit or _DEFAULT_LIMIT
        after = request.after_sequence
        while left > 0 or request.follow:
            limit = min(left, _AT_ONCE) if not request.follow else _AT_ONCE
            found = await asyncio.to_thread(self._log.read, after, limit)
            for record in found:
                yield _view(record)
            left -= len(found)
            after = found[-1].sequence if found else after
            if not found and not request.follow:
                return
            if not found:
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def QueryAudit(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.QueryAuditRequest, context: Context
    ) -> admin_pb2.QueryAuditResponse:
        """One page of what matches, newest first."""
        for name in ("kind_prefix", "tenant", "actor", "decision", "request_id"):
            if len(getattr(request, name)) > _LONGEST_FILTER:
                message = f"a filter has at most {_LONGEST_FILTER} characters"
                raise CloisterError("INVALID_FILTER", message, field=name)
        if request.before_sequence > _HIGHEST:
            raise CloisterError("INVALID_FILTER", "no record has such a number", field="before_sequence")
        wanted = Filter(
            kind_prefix=request.kind_prefix,
            tenant=request.tenant,
            actor=request.actor,
            decision=request.decision,
            request_id=request.request_id,
            since_ns=_nanoseconds(request.since) if request.HasField("since") else None,
            until_ns=_nanoseconds(request.until) if request.HasField("until") else None,
        )
        limit = min(request.limit or _DEFAULT_LIMIT, _MOST_IN_A_PAGE)
        page = await asyncio.to_thread(self._log.query, wanted, request.before_sequence, limit)
        return admin_pb2.QueryAuditResponse(
            records=map(_view, page.records), next_before_sequence=page.next_before, log_size=self._log.size
        )

    async def VerifyAudit(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.VerifyAuditRequest, context: Context
    ) -> admin_pb2.VerifyAuditResponse:
        """The whole log against its signed head, while it goes on growing."""
        verdict = await asyncio.to_thread(
            verify, self._home.audit_database, self._home.audit_head, self._log.public_key
        )
        return admin_pb2.VerifyAuditResponse(
            intact=verdict.intact,
            size=verdict.size,
            root=verdict.root,
            first_bad_sequence=verdict.first_bad_sequence or 0,
            reason=verdict.reason or "",
            message=verdict.message or "",
            open_intents=verdict.open_intents,
        )


def _nanoseconds(moment: Timestamp) -> int:
    """Since the epoch; the year 9999 and others that no record can have become the last or first that one can."""
    return max(-_HIGHEST, min(moment.seconds * 10**9 + moment.nanos, _HIGHEST))


def _view(record: StoredRecord) -> admin_pb2.TailAuditResponse:
    return admin_pb2.TailAuditResponse(
        sequence=record.sequence,
        time=timestamp(record.utc_ns),
        kind=record.kind,
        phase=record.phase,
        tenant=record.tenant,
        actor=record.actor,
        decision=record.decision,
        request_id=record.request_id,
        body_json=record.body.decode(),
        leaf_hash=record.leaf_hash,
    )
