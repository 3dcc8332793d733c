"""Row checksums, the commit counter, and dropped payloads."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_SEALED = ("operations", "runs", "sessions", "samplers", "checkpoints", "deleted_checkpoints")


def upgrade() -> None:
    """Add the columns. Rows of earlier releases have no checksum and are not checked."""
    for table in _SEALED:
        op.add_column(table, sa.Column("seal", sa.LargeBinary))
    op.add_column("operations", sa.Column("pruned", sa.Boolean))
    position = op.create_table(
        "position",
        sa.Column("identity", sa.String, primary_key=True),
        sa.Column("commits", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(position, [{"identity": uuid.uuid4().hex, "commits": 0}])
