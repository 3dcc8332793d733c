"""What recovery knows of a run: the numeric environment of its results, and why it can't go on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("runs", sa.Column("environment", sa.JSON))
    op.add_column("runs", sa.Column("fault", sa.Text))
