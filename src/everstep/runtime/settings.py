"""Settings: limits and intervals of a service, from a file, the environment and flags."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from everstep.integers import MAX_SECONDS
from everstep.text_files import read_text

FILE_NAME = "settings.toml"
ENV_PREFIX = "EVERSTEP_"
TEN_YEARS_SECONDS = 10 * 365 * 24 * 3600
_RENAMED = {
    "abandoned_seconds": "orphan_ttl_seconds",
    "most_samples": "max_inflight_samples",
}

Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TtlSeconds = Annotated[int, Field(ge=0, le=MAX_SECONDS)]


class Settings(BaseSettings):
    """Limits and intervals of a service.

    `Settings(...)` takes values as they are given. `Settings.load` also reads the file and the
    environment.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, use_attribute_docstrings=True
    )

    # Numeric environment

    threads: Count | None = None
    """CPU threads of a worker. None takes the number of cores. Part of the numeric environment:
    another number may change the last bits."""
    device: str | None = None
    """Torch device of the worker (``cpu``, ``cuda``). None takes CUDA when it is there."""
    dtype: str | None = None
    """Dtype of the base weights (``float32``, ``bfloat16``). None chooses by device."""
    context_length: Count | None = None
    """Tokens of the longest sequence that is served. None, or more than a model's own: that. It
    decides which frequencies a model with longrope or dynamic rotary embeddings computes with."""

    determinism: Literal["exact", "off"] = "exact"
    """Whether equal passes give equal bits. ``off`` lets CUDA take faster operations that don't,
    and gives up exact resume (P1) and exact recovery (P3): replays are compared to a tolerance."""

    lora_products: Literal["float32", "base"] = "float32"
    """Dtype of an adapter's products in training, for new runs on base weights of half precision:
    ``base`` computes them in the base's dtype with sums in float32. A run keeps its own."""

    # Runs and recovery

    replay_seconds: Seconds = 30.0
    """Bound on the replay after a restart, over all runs together, used since the last one or not:
    the run that would cost most is snapshotted when the sum exceeds it."""
    memory_bytes: Bytes | None = None
    """Bound on the memory of all runs' states. The least recently used runs are evicted to the
    vault. None takes a quarter of the machine's memory, or of what a GPU has beside the weights."""
    idle_seconds: Seconds = 600.0
    """A run that was not used for this long is evicted."""
    gap_seconds: Seconds = 300.0
    """How long an operation waits for a missing lower ``seq_id`` before it fails."""
    load_first_only: bool = False
    """The hosted service's rule: ``load_weights`` on a live run only as its first request."""
    hang_seconds: Seconds = 300.0
    """A worker whose step (a micro-batch, a decoded token) takes longer is killed."""
    worker_attempts: Count = 3
    """How often one operation may end its worker before it is failed. A run's snapshots are given
    up when they end it as often in a row."""
    shutdown_seconds: Seconds = 30.0
    """Bound on a graceful stop."""

    allow_diverged: bool = False
    """Make optimizer steps that turn weights or moments into NaN or infinity, and save such
    weights. Without it they fail, and a step that fails changes nothing."""

    # Requests

    poll_seconds: Seconds = 30.0
    """How long a poll for a result is held, or a sample while the service is full. Below the 45 s
    after which clients give up."""
    min_ttl_seconds: TtlSeconds = 3600
    """Smallest accepted ``ttl_seconds``."""
    max_ttl_seconds: TtlSeconds = TEN_YEARS_SECONDS
    """Largest accepted ``ttl_seconds``."""
    import_bytes: Bytes = 16 << 30
    """Largest upload of an import."""
    queue_bytes: Bytes = 4 << 30
    """Bytes of large passes (32 KiB and more) that one run may have queued, on the disk. Further
    ones are refused (429), and their client sends them again."""
    max_inflight_samples: Count = 4096
    """How many samples may be queued or executing. Further ones are refused (429)."""
    prefix_bytes: Bytes = 256 << 20
    """Memory of the worker's prefix cache, which holds computed prompts."""

    stable_reinforce: Literal["topr", "refuse"] = "topr"
    """What the loss ``stable_reinforce`` is: tapered off-policy REINFORCE, which is not the hosted
    service's definition, or ``refuse``."""
    recorded_sample_seconds: Seconds = 24 * 3600.0
    """How long the logprobs of samples with ``record_stability_info`` are kept after their last
    use."""

    # Vault

    disk_reserve_bytes: Bytes = 256 << 20
    """Space that a save has to leave free on the disk. A save that can't is refused."""
    vault_retry_seconds: Seconds = 120.0
    """How long a bucket that does not answer is retried before a save or a load fails."""
    scrub_bytes_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16e6
    """How fast the scrubber reads the vault."""
    scrub_interval_seconds: Seconds = 24 * 3600.0
    """How often the scrubber reads the vault."""
    collect_interval_seconds: Seconds = 3600.0
    """How often garbage is collected."""
    collect_grace_seconds: Seconds = 3600.0
    """How long garbage is kept."""
    orphan_ttl_seconds: Seconds = 7 * 24 * 3600.0
    """An unnamed sampler save is garbage when it was not used for this long and its session's
    client sent nothing."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only the given values. `load` reads the other sources."""
        return (init_settings,)

    @classmethod
    def load(cls, home: Path, flags: Iterable[str] = ()) -> Settings:
        """Read the settings of a home's service.

        A flag wins over the environment (``EVERSTEP_REPLAY_SECONDS=10``), the environment over
        ``settings.toml`` in the home (``replay_seconds = 10``), and that over the default.

        Args:
            home: the service's home. It need not exist.
            flags: ``name=value`` pairs of the command line. The last one counts.

        Raises:
            ValueError: a setting does not exist, has another name now, or can't have that value.
                The text names the source.
        """
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, value, source in (*_from_file(home), *_from_environment(), *_from_flags(flags)):
            _check_name(name, source)
            values[name], sources[name] = value, source
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError("; ".join(_problems(error, sources))) from error


def _from_file(home: Path) -> Iterator[tuple[str, Any, str]]:
    path = home / FILE_NAME
    try:
        values = tomllib.loads(read_text(path))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    for name, value in values.items():
        yield name, value, f"in {path}"


def _from_environment() -> Iterator[tuple[str, Any, str]]:
    source = EnvSettingsSource(Settings, case_sensitive=False, env_ignore_empty=True)
    for name in _RENAMED:
        if (ENV_PREFIX + name).lower() in source.env_vars:
            _check_name(name, f"in the environment ({(ENV_PREFIX + name).upper()})")
    for name, value in source().items():
        yield name, value, f"in the environment ({(ENV_PREFIX + name).upper()})"


def _from_flags(flags: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not equals:
            raise ValueError(f"{flag!r} is not NAME=VALUE of a setting")
        yield name, value, f"in --set {flag}"


def _check_name(name: str, source: str) -> None:
    if name in _RENAMED:
        raise ValueError(f"setting {name!r} ({source}) is called {_RENAMED[name]!r} now")
    if name not in Settings.model_fields:
        known = ", ".join(Settings.model_fields)
        raise ValueError(f"there is no setting {name!r} ({source}); there are {known}")


def _problems(error: ValidationError, sources: dict[str, str]) -> Iterator[str]:
    for problem in error.errors():
        name = str(problem["loc"][0])
        value = problem["input"]
        yield f"setting {name}={value} ({sources[name]}): {problem['msg']}"
