"""Digests of payloads and results, so that damage is detected and never served."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns. Operations of earlier releases have no digests and are not checked."""
    op.add_column("operations", sa.Column("payload_digest", sa.LargeBinary))
    op.add_column("operations", sa.Column("result_digest", sa.LargeBinary))
