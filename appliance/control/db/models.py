"""The tables of control.db, typed. Times are nanoseconds since the epoch, UTC.

The schema itself is made by the migrations beside this file; a test holds the two equal.
"""

from sqlalchemy import ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """What all tables share."""


class Meta(Base):
    """A fact about this appliance, such as its site or the outbox position."""

    __tablename__ = "meta"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Operator(Base):
    """A person who runs the appliance, known by an operating-system user."""

    __tablename__ = "operator"
    name: Mapped[str] = mapped_column(primary_key=True)
    uid: Mapped[int]
    roles: Mapped[str]
    """Comma-separated, sorted."""
    created_ns: Mapped[int]


class Tenant(Base):
    """Who owns applications and keys, with limits and the roll-up of what was used."""

    __tablename__ = "tenant"
    name: Mapped[str] = mapped_column(primary_key=True)
    max_concurrent: Mapped[int]
    weight: Mapped[int]
    suspended: Mapped[bool]
    created_ns: Mapped[int]
    tokens_used: Mapped[int]


class Grant(Base):
    """A tenant may call an alias."""

    __tablename__ = "tenant_grant"
    tenant: Mapped[str] = mapped_column(ForeignKey("tenant.name"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)


class ApiKey(Base):
    """A key of one application and the certificate issued with it; never the secret itself."""

    __tablename__ = "api_key"
    key_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenant.name"))
    application: Mapped[str]
    secret_hmac: Mapped[bytes]
    certificate_sha256: Mapped[bytes]
    created_ns: Mapped[int]
    expires_ns: Mapped[int]
    revoked_ns: Mapped[int | None]
    __table_args__ = (Index("api_key_application", "tenant", "application"),)


class Deployment(Base):
    """A model version that should run; `files` is a serialised cloister.engine.v1.FileSet, `options` likewise."""

    __tablename__ = "deployment"
    name: Mapped[str] = mapped_column(primary_key=True)
    model_version: Mapped[str]
    model_digest: Mapped[str]
    files: Mapped[bytes]
    options: Mapped[bytes]
    created_ns: Mapped[int]
    parked: Mapped[bool] = mapped_column(default=False)
    """It gave its memory to a version under trial; engine-host is not told of it until that has ended."""
    revoked: Mapped[str] = mapped_column(default="")
    """Why its version is no longer vouched for; it goes on while it runs and is not started again."""


class Derived(Base):
    """A derived file of engine-prepare's: what a worker computes with has this digest, or is not used."""

    __tablename__ = "derived"
    model_digest: Mapped[str] = mapped_column(primary_key=True)
    layout: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    size: Mapped[int]
    recorded_ns: Mapped[int]


class Alias(Base):
    """What clients call, and the deployment that answers."""

    __tablename__ = "alias"
    name: Mapped[str] = mapped_column(primary_key=True)
    deployment: Mapped[str] = mapped_column(ForeignKey("deployment.name"))


class AliasHistory(Base):
    """What an alias has answered with, from then on; `options` as a deployment has them."""

    __tablename__ = "alias_history"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    alias: Mapped[str]
    deployment: Mapped[str]
    model_version: Mapped[str]
    model_digest: Mapped[str]
    options: Mapped[bytes]
    set_ns: Mapped[int]
    __table_args__ = (Index("alias_history_alias", "alias", "number"),)


class Approval(Base):
    """A custodian signed a statement that approves a model version; `envelope` is the statement as it came."""

    __tablename__ = "approval"
    model_digest: Mapped[str] = mapped_column(primary_key=True)
    custodian: Mapped[str] = mapped_column(primary_key=True)
    envelope: Mapped[bytes]
    approved_ns: Mapped[int]


class LicenceAcceptance(Base):
    """An operator accepted the licences of a model version that ask for it."""

    __tablename__ = "licence_acceptance"
    model_digest: Mapped[str] = mapped_column(primary_key=True)
    operator: Mapped[str]
    accepted_ns: Mapped[int]


class Activation(Base):
    """A version tried on its way behind an alias, or back; while `ended_ns` is NULL nothing is decided."""

    __tablename__ = "activation"
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """activation or rollback."""
    alias: Mapped[str]
    operator: Mapped[str]
    model_version: Mapped[str]
    model_digest: Mapped[str]
    deployment: Mapped[str]
    """The one under trial."""
    made: Mapped[bool]
    """It was made for this trial, and goes when the trial fails."""
    previous: Mapped[str]
    """What the alias points at until the end is good; empty for none."""
    stage: Mapped[str]
    reason: Mapped[str]
    started_ns: Mapped[int]
    ended_ns: Mapped[int | None]
    __table_args__ = (Index("activation_open", "alias", unique=True, sqlite_where=text("ended_ns IS NULL")),)


class Untold(Base):
    """A change of this database that the audit log has not been told yet."""

    __tablename__ = "untold"
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    actor: Mapped[str]
    decision: Mapped[str]
    facts: Mapped[str]
    """JSON."""
    utc_ns: Mapped[int]


class Request(Base):
    """An admitted request: while it is open its tokens are reserved."""

    __tablename__ = "request"
    tenant: Mapped[str] = mapped_column(ForeignKey("tenant.name"), primary_key=True)
    request_id: Mapped[str] = mapped_column(primary_key=True)
    lease: Mapped[str]
    gateway_id: Mapped[str]
    application: Mapped[str]
    key_id: Mapped[str]
    model: Mapped[str]
    deployment: Mapped[str]
    model_digest: Mapped[str]
    prompt_tokens: Mapped[int]
    max_tokens: Mapped[int]
    state: Mapped[str]
    """open or settled."""
    admitted_ns: Mapped[int]
    settled_ns: Mapped[int | None]
    __table_args__ = (
        UniqueConstraint("lease", name="request_lease"),
        Index("request_open", "tenant", sqlite_where=text("state = 'open'")),
    )


class Usage(Base):
    """One row of the ledger: what one settled request used. Rows are only ever added."""

    __tablename__ = "usage"
    row: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    lease: Mapped[str]
    tenant: Mapped[str]
    application: Mapped[str]
    key_id: Mapped[str]
    request_id: Mapped[str]
    model: Mapped[str]
    model_digest: Mapped[str]
    outcome: Mapped[str]
    reason: Mapped[str]
    finish_reason: Mapped[str]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    duration_ns: Mapped[int]
    settled_ns: Mapped[int]
    __table_args__ = (
        UniqueConstraint("lease", name="usage_lease"),
        Index("usage_tenant", "tenant", "settled_ns"),
    )
