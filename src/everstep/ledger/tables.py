"""Tables in SQLAlchemy Core. The migrations in ``migrations/versions`` create them.

Some columns keep the names of the first releases: ``seal`` is the row checksum, ``place`` the
sequence id with which an operation was accepted.
"""

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
    literal_column,
)


class UtcTime(TypeDecorator[datetime]):
    """A time in UTC, also on databases without time zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Reject naive times and store UTC without its zone."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a naive time: {value}")
        return value.astimezone(UTC).replace(tzinfo=None) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Attach the zone UTC."""
        return value.replace(tzinfo=UTC) if value is not None else None


metadata = MetaData()

operations = Table(
    "operations",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("scope", String, nullable=False),
    Column("seq_id", BigInteger),  # null once a failed creation was replaced by a retry
    Column("place", BigInteger, nullable=False),  # the sequence id with which it was accepted
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
    Column("pruned", Boolean),  # the payload is dropped, no replay will need it
    Column("completion", BigInteger),  # of a sample: its position among those of its scope, from 1
    Column("retrieved", Boolean),  # the result is dropped, its client has it
    Column("weights", String),  # the path of the checkpoint that a sample is drawn from
    # Where a large payload or result lies in the payload log. The row holds none of it then.
    Column("payload_segment", BigInteger),
    Column("payload_offset", BigInteger),
    Column("payload_size", BigInteger),  # stays when the payload is dropped
    Column("result_segment", BigInteger),
    Column("result_offset", BigInteger),
    Column("result_size", BigInteger),
    UniqueConstraint("scope", "seq_id"),
)
for _column in (operations.c.payload_segment, operations.c.result_segment):
    _named = _column.is_not(None)
    Index(f"operations_by_{_column.name}", _column, sqlite_where=_named, postgresql_where=_named)
PENDING = operations.c.status == literal_column("'pending'")
"""The condition for operations that have not ended. An index of these serves no other form of it,
in particular none with a parameter."""
_numbered = operations.c.completion.is_not(None)
for _name, _column, _rows in (
    ("operations_unfinished", operations.c.seq_id, PENDING),
    ("operations_completed", operations.c.completion, _numbered),
):
    Index(_name, operations.c.scope, _column, sqlite_where=_rows, postgresql_where=_rows)

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
    Column("environment_changes", JSON(none_as_null=True)),
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

recorded_samples = Table(
    "recorded_samples",
    metadata,
    Column("request_id", String, primary_key=True),  # of the sample
    Column("session_id", String, nullable=False),
    Column("prompt", LargeBinary, nullable=False),
    Column("sequences", LargeBinary, nullable=False),
    Column("digest", LargeBinary, nullable=False),  # of prompt and sequences
    Column("last_used_at", UtcTime, nullable=False, index=True),
    Column("seal", LargeBinary),
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

Index("checkpoints_by_kind", *(checkpoints.c[n] for n in ("run_id", "kind", "created_at", "path")))
_COUNTED = ("created_at", "path", "kind", "listed", "quarantined", "expires_at")
Index("checkpoints_by_time", *(checkpoints.c[name] for name in _COUNTED))

deleted_checkpoints = Table(
    "deleted_checkpoints",
    metadata,
    Column("path", String, primary_key=True),
    Column("deleted_at", UtcTime, nullable=False),
    Column("seal", LargeBinary),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("id", String, primary_key=True),  # of a deleted run, session or sampler
    Column("kind", String, nullable=False),
    Column("deleted_with", String),  # the run or session that was deleted, for what it owned
    Column("deleted_at", UtcTime, nullable=False),
    Column("unfinished", Boolean, nullable=False),  # operations or files of it are still there
    Column("details", JSON, nullable=False),
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

# Of earlier releases. Commands are pinned in memory now (`everstep.vault.pins`).
pins = Table(
    "pins",
    metadata,
    Column("pin", String, primary_key=True),
    Column("created_at", UtcTime, nullable=False),
)

CHECKSUMMED = (
    operations,
    runs,
    sessions,
    samplers,
    recorded_samples,
    checkpoints,
    deleted_checkpoints,
    tombstones,
    audit,
    copies,
    weights_tokens,
)
"""Tables whose rows have a checksum (`everstep.ledger.sqlite.row_checksums`)."""
