"""The tables, as SQLAlchemy Core; the migrations in ``migrations/versions`` create them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


class UtcTime(TypeDecorator[datetime]):
    """A time that is written and read in UTC, on databases without time zones as well."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Refuse naive times; store UTC without its zone."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a naive time: {value}")
        return value.astimezone(UTC).replace(tzinfo=None) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Give times their zone back."""
        return value.replace(tzinfo=UTC) if value is not None else None


metadata = MetaData()

operations = Table(
    "operations",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("scope", String, nullable=False),
    Column("seq_id", BigInteger),  # null once a failed creation has given up its place
    Column("place", BigInteger, nullable=False),  # the sequence id it was accepted with
    Column("kind", String, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("session_id", String),
    Column("status", String, nullable=False),
    Column("result", LargeBinary),
    Column("media", String),
    Column("error", Text),
    Column("category", String),
    Column("seconds", Float),
    Column("accepted_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime),
    Column("payload_digest", LargeBinary),
    Column("result_digest", LargeBinary),
    Column("seal", LargeBinary),
    Column("pruned", Boolean),  # its payload is dropped: no replay will need it
    Column("completion", BigInteger),  # counts the ends in its scope, from 1
    Column("retrieved", Boolean),  # its result is dropped: its client has it
    Column("weights", String),  # of a sample: the checkpoint's path
    UniqueConstraint("scope", "seq_id"),
)
Index("operations_by_completion", operations.c.scope, operations.c.completion)
Index("operations_by_status", operations.c.status, operations.c.scope, operations.c.seq_id)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("session_id", String, nullable=False, index=True),
    Column("base_model", String, nullable=False),
    Column("lora", JSON, nullable=False),
    Column("optimizer", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("last_request_at", UtcTime, nullable=False),
    Column("status", String, nullable=False),
    Column("environment", JSON(none_as_null=True)),
    Column("fault", Text),
    Column("seal", LargeBinary),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("user_metadata", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("sdk_version", String, nullable=False),
    Column("project_id", String),
    Column("display_name", String),
    Column("created_at", UtcTime, nullable=False),
    Column("last_seen_at", UtcTime, nullable=False),
    Column("finished", String),
    Column("detail", Text),
    Column("idempotency_key", String, unique=True),
    Column("seal", LargeBinary),
    Column("finished_at", UtcTime),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", String, primary_key=True),
    Column("session_id", String, nullable=False, index=True),
    Column("base_model", String, nullable=False),
    Column("model_path", String),
    Column("created_at", UtcTime, nullable=False),
    Column("seal", LargeBinary),
    Column("clients", BigInteger),
    Column("inflight_run", String),
    Column("weights_position", BigInteger),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("path", String, primary_key=True),
    Column("run_id", String, nullable=False, index=True),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("base_model", String, nullable=False),
    Column("lora", JSON, nullable=False),
    Column("optimizer", JSON),
    Column("user_metadata", JSON),
    Column("expires_at", UtcTime),
    Column("public", Boolean, nullable=False),
    Column("listed", Boolean, nullable=False),
    Column("quarantined", Boolean, nullable=False),
    Column("unmarked", Boolean, nullable=False),
    Column("seal", LargeBinary),
)

deleted_checkpoints = Table(
    "deleted_checkpoints",
    metadata,
    Column("path", String, primary_key=True),
    Column("deleted_at", UtcTime, nullable=False),
    Column("seal", LargeBinary),
)

position = Table(
    "position",
    metadata,
    Column("identity", String, primary_key=True),
    Column("commits", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("at", UtcTime, nullable=False, index=True),
    Column("event", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("path", String),
    Column("run_id", String),
    Column("details", JSON, nullable=False),
    Column("seal", LargeBinary),
    sqlite_autoincrement=True,
)

copies = Table(
    "copies",
    metadata,
    Column("idempotency_key", String, primary_key=True),
    Column("request", String, nullable=False),
    Column("path", String, nullable=False),
    Column("seal", LargeBinary),
)

weights_tokens = Table(
    "weights_tokens",
    metadata,
    Column("token_id", String, primary_key=True),
    Column("digest", String, nullable=False, unique=True),
    Column("path", String, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("seal", LargeBinary),
)

SEALED = (
    operations,
    runs,
    sessions,
    samplers,
    checkpoints,
    deleted_checkpoints,
    audit,
    copies,
    weights_tokens,
)
"""Tables whose rows have a seal (`everstep.ledger.seals`)."""
