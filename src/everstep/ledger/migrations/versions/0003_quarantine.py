"""Quarantine: a flag for damaged checkpoints, which are not listed."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "checkpoints",
        sa.Column("quarantined", sa.Boolean, nullable=False, server_default=sa.false()),
    )
