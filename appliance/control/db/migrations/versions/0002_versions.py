"""Model versions: who approved them, whose licence was accepted, what each alias was, and what is under trial."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the tables, and that a deployment can be parked, or revoked."""
    op.add_column("deployment", sa.Column("parked", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("deployment", sa.Column("revoked", sa.String(), nullable=False, server_default=""))
    _standing()
    _aliases()
    op.create_table(
        "untold",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("decision", sa.String(), nullable=False),
        sa.Column("facts", sa.String(), nullable=False),
        sa.Column("utc_ns", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def _standing() -> None:
    """What people said about a version."""
    op.create_table(
        "approval",
        sa.Column("model_digest", sa.String(), nullable=False),
        sa.Column("custodian", sa.String(), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("approved_ns", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("model_digest", "custodian"),
    )
    op.create_table(
        "licence_acceptance",
        sa.Column("model_digest", sa.String(), nullable=False),
        sa.Column("operator", sa.String(), nullable=False),
        sa.Column("accepted_ns", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("model_digest"),
    )


def _aliases() -> None:
    """What an alias was, and is to become."""
    op.create_table(
        "alias_history",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("model_version", sa.String(), nullable=False),
        sa.Column("model_digest", sa.String(), nullable=False),
        sa.Column("options", sa.LargeBinary(), nullable=False),
        sa.Column("set_ns", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_index("alias_history_alias", "alias_history", ["alias", "number"], unique=False)
    op.create_table(
        "activation",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("operator", sa.String(), nullable=False),
        sa.Column("model_version", sa.String(), nullable=False),
        sa.Column("model_digest", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("made", sa.Boolean(), nullable=False),
        sa.Column("previous", sa.String(), nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("started_ns", sa.Integer(), nullable=False),
        sa.Column("ended_ns", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "activation_open", "activation", ["alias"], unique=True, sqlite_where=sa.text("ended_ns IS NULL")
    )
