"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables of release 0.1."""
    op.create_table(
        "operations",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("scope", sa.String, nullable=False),
        sa.Column("seq_id", sa.BigInteger),
        sa.Column("place", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("session_id", sa.String),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("result", sa.LargeBinary),
        sa.Column("media", sa.String),
        sa.Column("error", sa.Text),
        sa.Column("category", sa.String),
        sa.Column("seconds", sa.Float),
        sa.Column("accepted_at", sa.DateTime, nullable=False),
        sa.Column("finished_at", sa.DateTime),
        sa.UniqueConstraint("scope", "seq_id"),
    )
    op.create_index("operations_by_status", "operations", ["status", "scope", "seq_id"])
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("session_id", sa.String, nullable=False, index=True),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("lora", sa.JSON, nullable=False),
        sa.Column("optimizer", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("last_request_at", sa.DateTime, nullable=False),
        sa.Column("status", sa.String, nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.String, primary_key=True),
        sa.Column("user_metadata", sa.JSON, nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("sdk_version", sa.String, nullable=False),
        sa.Column("project_id", sa.String),
        sa.Column("display_name", sa.String),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("last_seen_at", sa.DateTime, nullable=False),
        sa.Column("finished", sa.String),
        sa.Column("detail", sa.Text),
        sa.Column("idempotency_key", sa.String, unique=True),
    )
    op.create_table(
        "samplers",
        sa.Column("sampler_id", sa.String, primary_key=True),
        sa.Column("session_id", sa.String, nullable=False, index=True),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("model_path", sa.String),
        sa.Column("created_at", sa.DateTime, nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("path", sa.String, primary_key=True),
        sa.Column("run_id", sa.String, nullable=False, index=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("lora", sa.JSON, nullable=False),
        sa.Column("optimizer", sa.JSON),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("expires_at", sa.DateTime),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("listed", sa.Boolean, nullable=False),
    )
