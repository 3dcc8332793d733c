"""Completion order, dropped results and weights of samples, clients of samplers, inflight saves."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("operations", sa.Column("completion", sa.BigInteger))
    op.add_column("operations", sa.Column("retrieved", sa.Boolean))
    op.add_column("operations", sa.Column("weights", sa.String))
    op.create_index("operations_by_completion", "operations", ["scope", "completion"])
    op.add_column("samplers", sa.Column("clients", sa.BigInteger))
    op.add_column("samplers", sa.Column("inflight_run", sa.String))
    op.add_column("samplers", sa.Column("weights_position", sa.BigInteger))
