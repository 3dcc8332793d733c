"""Recorded samples: tokens and logprobs of samples, for the passes that train on them."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "recorded_samples",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("session_id", sa.String, nullable=False),
        sa.Column("prompt", sa.LargeBinary, nullable=False),
        sa.Column("sequences", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("last_used_at", sa.DateTime, nullable=False),
        sa.Column("seal", sa.LargeBinary),
    )
    op.create_index("ix_recorded_samples_last_used_at", "recorded_samples", ["last_used_at"])
