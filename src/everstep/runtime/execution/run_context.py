"""RunContext: the parts that all runs of a service share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from everstep.ledger import Ledger, Operation
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.execution.recovery_queue import RecoveryQueue
from everstep.runtime.execution.replay_budget import ReplayBudget
from everstep.runtime.settings import Settings
from everstep.runtime.workers.base import WorkerPool
from everstep.runtime.workers.eviction import Eviction
from everstep.vault import Vault
from everstep.vault.pins import Pins


@dataclass(frozen=True)
class RunContext:
    """The parts of a service that its runs work with.

    Attributes:
        home: the directory that holds everything the service keeps.
        ledger: holds their operations and results.
        vault: holds their snapshots.
        workers: hold them in memory and execute their commands.
        pins: of the commands that write them to the vault.
        catalog: resolves the paths that they load, and locks the paths that they save.
        settings: limits and intervals.
        eviction: accounts for the memory that they take.
        recovery: decides which run is brought back next.
        budget: decides which run is snapshotted next.
        on_finished: called with each operation that succeeded or failed.
        on_ended: called with the id of a run that was not created, or that is corrupted.
    """

    home: Path
    ledger: Ledger
    vault: Vault
    workers: WorkerPool
    pins: Pins
    catalog: CheckpointCatalog
    settings: Settings
    eviction: Eviction
    recovery: RecoveryQueue
    budget: ReplayBudget
    on_finished: Callable[[Operation], None]
    on_ended: Callable[[str], None]
