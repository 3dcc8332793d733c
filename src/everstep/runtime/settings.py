"""Everything about the runtime that a person may want to change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

TEN_YEARS_SECONDS = 10 * 365 * 24 * 3600


@dataclass(frozen=True)
class Settings:
    """Limits and intervals of the runtime.

    Attributes:
        threads: CPU threads of a worker; None takes the number of cores. Part of the numeric
            environment: another number may change the last bits.
        device: torch device of the worker (``cpu``, ``cuda``); None takes CUDA when it is there.
        dtype: dtype of the base weights (``float32``, ``bfloat16``); None chooses by device.
        gap_seconds: how long an operation waits for a missing lower ``seq_id`` before it fails.
        poll_seconds: how long a poll for a result is held, or a sample for which there is no place,
            below the 45 s after which clients give up.
        replay_seconds: a run is snapshotted when replaying it would cost more than this.
        min_ttl_seconds: smallest accepted ``ttl_seconds``.
        max_ttl_seconds: largest accepted ``ttl_seconds``.
        load_first_only: True gives the hosted service's rule: ``load_weights`` on a live run
            only as its first request.
        hang_seconds: a worker that is at one step (a micro-batch, a decoded token) for longer is
            hung and is killed.
        memory_bytes: what the states of runs may take in memory together; the least recently used
            ones beyond it are evicted to the vault. None takes a quarter of the memory.
        idle_seconds: a run that nobody used for so long is evicted.
        disk_reserve_bytes: what a save has to leave free on the disk; one that can't is refused.
        import_bytes: the largest upload of an import.
        vault_retry_seconds: for how long a bucket that does not answer is asked again before a save
            or a load fails.
        scrub_bytes_per_second: how fast the scrubber re-reads the vault.
        scrub_interval_seconds: how often it does.
        collect_interval_seconds: how often what nobody needs any more is removed.
        collect_grace_seconds: for how long it stays all the same.
        abandoned_seconds: an unnamed sampler save is collected when for so long it was not used,
            and nothing was heard of its session's client.
        worker_attempts: how often one operation may end its worker before it is failed.
        most_samples: how many samples wait or are under way at a time; a client that sends more
            is asked to wait (429).
        prefix_bytes: what the worker may keep of prompts, so that those that begin alike are not
            computed again.
        shutdown_seconds: bound on a graceful stop.
    """

    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    gap_seconds: float = 300.0
    poll_seconds: float = 30.0
    replay_seconds: float = 30.0
    min_ttl_seconds: int = 3600
    max_ttl_seconds: int = TEN_YEARS_SECONDS
    load_first_only: bool = False
    hang_seconds: float = 300.0
    memory_bytes: int | None = None
    idle_seconds: float = 600.0
    disk_reserve_bytes: int = 256 << 20
    import_bytes: int = 16 << 30
    vault_retry_seconds: float = 120.0
    scrub_bytes_per_second: float = 16e6
    scrub_interval_seconds: float = 24 * 3600.0
    collect_interval_seconds: float = 3600.0
    collect_grace_seconds: float = 3600.0
    abandoned_seconds: float = 7 * 24 * 3600.0
    worker_attempts: int = 3
    most_samples: int = 4096
    prefix_bytes: int = 256 << 20
    shutdown_seconds: float = 30.0

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> Settings:
        """Read ``name=value`` pairs; what is not named keeps its default.

        Raises:
            ValueError: there is no such setting, or it can't have that value.
        """
        types = get_type_hints(cls)
        values: dict[str, Any] = {}
        for pair in pairs:
            name, equals, text = pair.partition("=")
            if not equals or name not in types:
                known = ", ".join(field.name for field in fields(cls))
                raise ValueError(f"{pair!r} is not name=value of a setting; there are {known}")
            try:
                values[name] = TypeAdapter(types[name]).validate_strings(text)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise ValueError(f"setting {name}={text}: {problem}") from error
        return cls(**values)
