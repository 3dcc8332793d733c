"""Tombstones of deleted runs, sessions and samplers."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "tombstones",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("deleted_with", sa.String),
        sa.Column("deleted_at", sa.DateTime, nullable=False),
        sa.Column("unfinished", sa.Boolean, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("seal", sa.LargeBinary),
    )
