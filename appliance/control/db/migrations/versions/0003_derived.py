"""Derived files: the digests of packed weights."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add their table."""
    op.create_table(
        "derived",
        sa.Column("model_digest", sa.String(), nullable=False),
        sa.Column("layout", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("recorded_ns", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("model_digest", "layout"),
    )
