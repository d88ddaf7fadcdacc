"""Which models a tenant may use: granted aliases that point at a deployment. What it may not use is not there."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from appliance.control.db.models import Alias, Deployment, Grant
from appliance.errors import CloisterError

# On the way of every request, so built once and without the ORM.
_ALIAS, _DEPLOYMENT, _GRANT = Alias.__table__.c, Deployment.__table__.c, Grant.__table__.c
_VISIBLE = (
    select(_ALIAS.name, _DEPLOYMENT.name, _DEPLOYMENT.model_digest)
    .join_from(Alias.__table__, Grant.__table__, _GRANT.alias == _ALIAS.name)
    .join(Deployment.__table__, _DEPLOYMENT.name == _ALIAS.deployment)
    .where(_GRANT.tenant == bindparam("tenant"))
    .order_by(_ALIAS.name)
)
_VISIBLE_AS = _VISIBLE.where(_ALIAS.name == bindparam("alias"))


@dataclass(frozen=True)
class VisibleModel:
    """An alias a tenant may call, and what answers."""

    alias: str
    deployment: str
    model_digest: str


def visible_model(session: Session, tenant: str, alias: str) -> VisibleModel:
    """The model behind `alias`.

    Raises:
        CloisterError: MODEL_NOT_FOUND, in the same words whether it does not exist or is not granted.
    """
    row = session.execute(_VISIBLE_AS, {"tenant": tenant, "alias": alias}).one_or_none()
    if row is None:
        raise CloisterError(
            "MODEL_NOT_FOUND",
            "no model of that name that this tenant may use; ListModels names those it may",
            grpc.StatusCode.NOT_FOUND,
        )
    return VisibleModel(row[0], row[1], row[2])


def check_capability(capabilities: Sequence[str], wanted: str) -> None:
    """Refuse to ask a model for what it does not answer.

    Raises:
        CloisterError: CAPABILITY_MISSING.
    """
    if wanted and wanted not in capabilities:
        has = ", ".join(capabilities) or "nothing"
        raise CloisterError(
            "CAPABILITY_MISSING",
            f"the model answers {has}, and not {wanted}; ListModels names the capabilities of each",
            grpc.StatusCode.FAILED_PRECONDITION,
            metadata={"capabilities": ",".join(capabilities)},
        )


def visible_models(session: Session, tenant: str) -> Sequence[VisibleModel]:
    """All of them, by name."""
    return [VisibleModel(row[0], row[1], row[2]) for row in session.execute(_VISIBLE, {"tenant": tenant})]
