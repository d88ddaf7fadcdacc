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


class Alias(Base):
    """What clients call, and the deployment that answers."""

    __tablename__ = "alias"
    name: Mapped[str] = mapped_column(primary_key=True)
    deployment: Mapped[str] = mapped_column(ForeignKey("deployment.name"))


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
