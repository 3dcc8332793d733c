"""Unwritten checkpoint metadata, copies, weights access tokens, the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the columns and tables."""
    unmarked = sa.Column("unmarked", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("checkpoints", unmarked)
    op.add_column("sessions", sa.Column("finished_at", sa.DateTime))
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", sa.DateTime, nullable=False, index=True),
        sa.Column("event", sa.String, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("path", sa.String),
        sa.Column("run_id", sa.String),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("seal", sa.LargeBinary),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "copies",
        sa.Column("idempotency_key", sa.String, primary_key=True),
        sa.Column("request", sa.String, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("seal", sa.LargeBinary),
    )
    op.create_table(
        "weights_tokens",
        sa.Column("token_id", sa.String, primary_key=True),
        sa.Column("digest", sa.String, nullable=False, unique=True),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("expires_at", sa.DateTime),
        sa.Column("seal", sa.LargeBinary),
    )
