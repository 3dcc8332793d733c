"""Indexes for pages of checkpoints, and for the newest one of a run."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Create the indexes. The second one also counts what a page is a part of."""
    by_kind = ["run_id", "kind", "created_at", "path"]
    op.create_index("checkpoints_by_kind", "checkpoints", by_kind)
    by_time = ["created_at", "path", "kind", "listed", "quarantined", "expires_at"]
    op.create_index("checkpoints_by_time", "checkpoints", by_time)
