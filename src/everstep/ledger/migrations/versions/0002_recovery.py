"""Numeric environments and faults of runs, and tombstones of deleted checkpoints."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("runs", sa.Column("environment", sa.JSON))
    op.add_column("runs", sa.Column("fault", sa.Text))
    op.create_table(
        "deleted_checkpoints",
        sa.Column("path", sa.String, primary_key=True),
        sa.Column("deleted_at", sa.DateTime, nullable=False),
    )
