"""Locations of large requests and results in the payload log. Older ones stay in their rows."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Create the columns, and indexes of the rows that name a segment."""
    for content in ("payload", "result"):
        for name in ("segment", "offset", "size"):
            op.add_column("operations", sa.Column(f"{content}_{name}", sa.BigInteger))
        segment = f"{content}_segment"
        op.create_index(
            f"operations_by_{segment}",
            "operations",
            [segment],
            sqlite_where=sa.text(f"{segment} IS NOT NULL"),
            postgresql_where=sa.text(f"{segment} IS NOT NULL"),
        )
