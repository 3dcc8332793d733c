"""Changes of runs' numeric environments."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the column."""
    op.add_column("runs", sa.Column("environment_changes", sa.JSON))
