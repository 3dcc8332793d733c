"""Digests of what operations ask and gave, so that a page that rotted is found and not served."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns; operations of earlier releases have none, and are not checked."""
    op.add_column("operations", sa.Column("payload_digest", sa.LargeBinary))
    op.add_column("operations", sa.Column("result_digest", sa.LargeBinary))
