"""Rows of control.db and states of the engine as the admin protocol shows them."""

from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import select
from sqlalchemy.orm import Session

from appliance.control.admission import reservations
from appliance.control.db.models import ApiKey, Deployment, Grant, Tenant
from appliance.control.deployments import Deployments
from appliance.protos import admin_pb2
from engine.protos import engine_pb2

PARKED = "parked"
"""State of a deployment that gave its memory to a version under trial."""
_View = TypeVar("_View", bound=Message)


def timestamp(nanoseconds: int) -> Timestamp:
    """A time as the protocol has it."""
    stamp = Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp


def tenant_view(session: Session, tenant: Tenant) -> admin_pb2.Tenant:
    """A tenant with its grants, what it used, and what it has reserved."""
    models = session.scalars(select(Grant.alias).where(Grant.tenant == tenant.name).order_by(Grant.alias))
    in_force = reservations.in_force(session, tenant.name)
    return admin_pb2.Tenant(
        name=tenant.name,
        models=models.all(),
        max_concurrent=tenant.max_concurrent,
        weight=tenant.weight,
        suspended=tenant.suspended,
        created_at=timestamp(tenant.created_ns),
        tokens_used=tenant.tokens_used,
        tokens_reserved=in_force.tokens,
        requests_open=in_force.requests,
    )


def key_view(key: ApiKey, now_ns: int) -> admin_pb2.Key:
    """A key without its secret."""
    in_time = "active" if key.expires_ns > now_ns else "expired"
    return admin_pb2.Key(
        key_id=key.key_id,
        tenant=key.tenant,
        application=key.application,
        created_at=timestamp(key.created_ns),
        expires_at=timestamp(key.expires_ns),
        state=in_time if key.revoked_ns is None else "revoked",
        certificate_sha256=key.certificate_sha256.hex(),
    )


def deployment_view(
    row: Deployment, deployments: Deployments, counters: engine_pb2.GetStatusResponse | None = None
) -> admin_pb2.Deployment:
    """A deployment as desired, how it is, and what its engine counts."""
    status = deployments.status(row.name)
    return admin_pb2.Deployment(
        name=row.name,
        model_version=row.model_version,
        model_digest=row.model_digest,
        state=PARKED if row.parked else deployments.state(row.name),
        reason=status.reason,
        message=status.message,
        restarts=status.restarts,
        options=_admin_options(row.options),
        max_context_tokens=status.max_context_tokens,
        worker_pid=status.worker_pid,
        runs_as=status.runs_as,
        engine=None if counters is None else shared(counters, admin_pb2.EngineCounters()),
    )


def device_view(device: engine_pb2.Device, deployments: list[str]) -> admin_pb2.Device:
    """A device and the deployments on it."""
    view = shared(device, admin_pb2.Device())
    view.deployments.extend(deployments)
    return view


def plan_view(plan: engine_pb2.MemoryPlan) -> admin_pb2.MemoryPlan:
    """A memory plan in the operators' words, which are the engine's."""
    view = shared(plan, admin_pb2.MemoryPlan())
    view.options.CopyFrom(shared(plan.options, admin_pb2.DeploymentOptions()))
    return view


def shared(source: Message, target: _View) -> _View:
    """`target` with every plain field of `source` that it has under the same name."""
    for field, value in source.ListFields():
        if field.name in target.DESCRIPTOR.fields_by_name and field.message_type is None:
            setattr(target, field.name, value)
    return target


def _admin_options(stored: bytes) -> admin_pb2.DeploymentOptions:
    return shared(engine_pb2.DeploymentOptions.FromString(stored), admin_pb2.DeploymentOptions())


def engine_options(options: admin_pb2.DeploymentOptions) -> engine_pb2.DeploymentOptions:
    """The options in the engine's own words."""
    return engine_pb2.DeploymentOptions(**{field.name: value for field, value in options.ListFields()})
