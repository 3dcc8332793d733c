"""Home reader: the read-only queries of a service, on a home on which none runs.

Commands that list and show wait for its imports. So what most of them don't need is imported later.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from everstep.ledger import Ledger
from everstep.runtime.queries.runs import RunQueries
from everstep.runtime.queries.sessions import SessionQueries

if TYPE_CHECKING:
    from everstep.runtime.checkpoints.details import CheckpointDetails
    from everstep.vault import Vault
    from everstep.wire.messages.maintenance import QuarantineResponse


class HomeReader:
    """Reads a home as its service would, with the same queries. Changes nothing.

    A service may start, and write, while the home is read. What a service would do as it starts is
    not done: operations that were accepted and not executed are not executed.

    Args:
        home: the home.
        ledger: its ledger, opened for reading. `close` closes it.

    Attributes:
        run_queries: runs and checkpoints.
        session_queries: sessions.
    """

    def __init__(self, home: Path, ledger: Ledger) -> None:
        self._home = home
        self._ledger = ledger
        self._vault: Vault | None = None
        self.run_queries = RunQueries(ledger)
        self.session_queries = SessionQueries(ledger)

    @classmethod
    async def open(cls, home: Path) -> HomeReader:
        """Open a home for reading.

        Raises:
            LedgerError: it has no ledger, or one of another release.
            LedgerDamaged: the ledger can't be read, or lacks acknowledged transactions.
        """
        return cls(home, await Ledger.open_read_only(home / "ledger.sqlite"))

    async def close(self) -> None:
        """Close the ledger."""
        await self._ledger.close()

    async def vault(self) -> Vault:
        """Return the vault, opened when it is first needed: it may be in a bucket.

        Raises:
            VaultError: the home's ``vault.json`` can't be read.
            StoreFailed: the bucket does not answer.
        """
        from everstep.vault.open import IMPATIENT_SECONDS, open_vault

        if self._vault is None:
            self._vault = await asyncio.to_thread(
                open_vault, self._home, writer=False, retry_seconds=IMPATIENT_SECONDS
            )
        return self._vault

    async def quarantined(self) -> QuarantineResponse:
        """List the damaged files that were moved to quarantine. Raises as `vault` does."""
        from everstep.runtime.queries.quarantine import quarantine_response

        return await asyncio.to_thread(quarantine_response, await self.vault())

    async def checkpoint_details(self) -> CheckpointDetails:
        """Return the queries of single checkpoints. Raises as `vault` does."""
        from everstep.runtime.authorization import Authorization
        from everstep.runtime.checkpoints.catalog import CheckpointCatalog
        from everstep.runtime.checkpoints.details import CheckpointDetails
        from everstep.runtime.model_record import RecordedModels
        from everstep.runtime.settings import Settings

        vault = await self.vault()
        models = await asyncio.to_thread(RecordedModels.of, self._home)
        catalog = CheckpointCatalog(self._ledger, vault, Settings())
        return CheckpointDetails(vault, catalog, Authorization(self._ledger), models)
