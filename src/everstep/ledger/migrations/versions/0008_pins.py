"""Pins: commands that are writing files to the vault."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "pins",
        sa.Column("pin", sa.String, primary_key=True),
        sa.Column("created_at", sa.DateTime, nullable=False),
    )
