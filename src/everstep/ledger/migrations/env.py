"""Alembic environment: migrates the connection that the ledger passes in."""

from alembic import context

from everstep.ledger.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
