"""Smaller indexes of operations: the unfinished ones, and the numbered completions of samplers.

An operation that is accepted and ends leaves nothing in the first one, and that of a run nothing in
the second one. Each transaction of a step wrote one to three pages of indexes more.
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Replace the indexes by status and by completion."""
    op.drop_index("operations_by_status", "operations")
    op.drop_index("operations_by_completion", "operations")
    for name, column, condition in (
        ("operations_unfinished", "seq_id", "status = 'pending'"),
        ("operations_completed", "completion", "completion IS NOT NULL"),
    ):
        op.create_index(
            name,
            "operations",
            ["scope", column],
            sqlite_where=sa.text(condition),
            postgresql_where=sa.text(condition),
        )
