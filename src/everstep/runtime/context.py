"""RuntimeContext: the parts of a service that its rooms share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from everstep.ledger import Ledger
from everstep.runtime.authorization import Authorization
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.settings import Settings
from everstep.runtime.workers.base import WorkerPool
from everstep.vault import Vault
from everstep.vault.pins import Pins


@dataclass(frozen=True)
class RuntimeContext:
    """The parts that one service's runs, samplers, checkpoints and queries share.

    `Runtime.open` makes it. A class of the runtime that needs more than one of these parts takes
    the context as its first argument.

    Attributes:
        home: the directory that holds everything the service keeps.
        ledger: operations, futures, runs, sessions and the index of checkpoints.
        vault: the checkpoints' files and manifests.
        workers: the processes that hold models and runs.
        catalog: look-up, locks and deletion of checkpoints.
        settings: limits and intervals.
        authorization: decides who may read a checkpoint.
        pins: the commands of workers that are writing to the vault.
    """

    home: Path
    ledger: Ledger
    vault: Vault
    workers: WorkerPool
    catalog: CheckpointCatalog
    settings: Settings
    authorization: Authorization
    pins: Pins = field(default_factory=Pins)
