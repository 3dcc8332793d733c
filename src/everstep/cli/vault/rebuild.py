"""Rebuilding a lost database: rows of checkpoints and runs, from the manifests in the vault.

The vault does not hold operations and futures that were not yet part of a checkpoint or snapshot,
sessions, samplers, tokens and the audit log: those are lost. A run resumes from its newest state.
Expiry, publication and tags come from the checkpoints' metadata files. An unnamed sampler save
stays unlisted and is garbage, as its session is lost.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from everstep.cli.common import output
from everstep.cli.common.errors import Refused
from everstep.cli.common.options import existing_home
from everstep.cli.common.progress_bars import progress_bar
from everstep.cli.vault import tables
from everstep.ledger import Checkpoint, Ledger, Run
from everstep.runtime import Settings
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.execution.snapshots import KIND
from everstep.runtime.payloads import optimizer_of
from everstep.vault import CheckpointId, CheckpointQuarantined, Manifest, Vault, open_vault
from everstep.vault.open import set_location, url_of
from everstep.vault.storage.keys import KINDS
from everstep.vault.verify import Report, verify

_INFIX = ":train:"


@dataclass
class Rebuilt:
    """The result of a rebuild.

    Attributes:
        report: the verification before the rebuild.
        runs: number of rows of runs that were inserted.
        checkpoints: number of rows of checkpoints that were inserted.
        unknown_runs: runs whose manifests hold too little for a row.
        quarantined: checkpoints that are left out because they are in quarantine.
    """

    report: Report
    runs: int = 0
    checkpoints: int = 0
    unknown_runs: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)


def rebuild_database(home: Path, vault_url: str | None, as_json: bool) -> bool:
    """Rebuild the database and print the result.

    Args:
        home: the home. No service may run on it.
        vault_url: bucket of its vault. An absent home is created, and takes over the vault of the
            lost home in that bucket.
        as_json: print JSON.

    Returns:
        Whether no file is damaged. Damaged checkpoints are left out.

    Raises:
        Refused: there is a write-ahead log without its database.
        LedgerLocked: a service runs on the home.
    """
    if vault_url is None or (home.expanduser() / "vault").is_dir():
        home = existing_home(home, vault_url if url_of(home.expanduser()) else None)
    else:
        home = home.expanduser().resolve()
        home.mkdir(parents=True, exist_ok=True)
    wal = home / "ledger.sqlite-wal"
    if wal.exists() and not (home / "ledger.sqlite").exists():
        raise Refused(f"{wal} exists without its database; move it away, then rebuild.")
    done = asyncio.run(_rebuild(home, vault_url, as_json))
    if as_json:
        content = tables.report_json(done.report, [])
        content |= {"runs": done.runs, "recreated": done.checkpoints}
        content |= {"unknown_runs": done.unknown_runs, "quarantined": done.quarantined}
        output.print_json(content)
        return done.report.ok
    out = output.console()
    if done.report.damaged:
        tables.print_damaged(done.report.damaged)
    out.print(
        f"{output.counted(done.checkpoints, 'checkpoint')} and {output.counted(done.runs, 'run')} "
        "restored to the database."
    )
    if done.unknown_runs:
        out.print(
            "The manifests hold too little to restore the runs " + ", ".join(done.unknown_runs)
        )
    if done.quarantined:
        out.print("In quarantine, and left out: " + ", ".join(done.quarantined))
    return done.report.ok


async def _rebuild(home: Path, vault_url: str | None, quiet: bool) -> Rebuilt:
    ledger = await Ledger.open(home / "ledger.sqlite", allow_missing=True)
    try:
        set_location(home, vault_url, adopt=vault_url is not None)
        vault = open_vault(home, writer=False)
        with progress_bar("verifying", quiet=quiet) as progress:
            done = Rebuilt(verify(vault, progress=progress))
        damaged = {each for damage in done.report.damaged for each in damage.checkpoints}
        by_run: dict[str, list[Manifest]] = defaultdict(list)
        intact, done.quarantined = _intact(vault, damaged)
        for manifest in intact:
            by_run[manifest.run_id].append(manifest)
        rows = [row for manifests in by_run.values() for row in map(_row, manifests) if row]
        runs = {run_id: _run(run_id, manifests) for run_id, manifests in by_run.items()}
        done.unknown_runs = sorted(run_id for run_id, run in runs.items() if run is None)
        done.runs, done.checkpoints = await ledger.insert_missing(filter(None, runs.values()), rows)
        await CheckpointCatalog(ledger, vault, Settings()).follow_quarantine()
        return done
    finally:
        await ledger.close()


def _intact(vault: Vault, damaged: set[CheckpointId]) -> tuple[list[Manifest], list[str]]:
    """Return the manifests of all that can be loaded, and what is in quarantine."""
    found, quarantined = [], []
    for each in (CheckpointId(kind, *names) for kind in KINDS for names in vault.names(kind)):
        if each not in damaged:
            try:
                found.append(vault.with_metadata(vault.manifest(*each)))
            except CheckpointQuarantined:
                quarantined.append(tables.display_name(each))
    return found, quarantined


def _row(manifest: Manifest) -> Checkpoint | None:
    """Build a checkpoint's row, or None for a snapshot, which has none."""
    if not manifest.id.has_path:
        return None
    return Checkpoint(
        path=manifest.id.path,
        run_id=manifest.run_id,
        kind=manifest.kind,
        name=manifest.name,
        created_at=manifest.created_at,
        size_bytes=manifest.size,
        base_model=manifest.base_model,
        lora=manifest.lora,
        optimizer=manifest.optimizer,
        user_metadata=manifest.user_metadata,
        expires_at=manifest.expires_at,
        public=manifest.public,
        listed=manifest.listed,
    )


def _run(run_id: str, manifests: list[Manifest]) -> Run | None:
    """Build a run's row; None unless its session and a state with its optimizer are known.

    A run without a state that was made by one of its own operations holds copies or imports.
    """
    session_id, infix, _ = run_id.rpartition(_INFIX)
    copied = all(
        each.request_id is None and each.kind != KIND and (each.parents or each.imported)
        for each in manifests
    )
    states = [each for each in manifests if copied or each.optimizer is not None]
    if not infix or not states:
        return None
    newest = max(states, key=lambda each: each.position)
    times = [each.created_at for each in manifests]
    return Run(
        run_id=run_id,
        session_id=session_id,
        base_model=newest.base_model,
        lora=newest.lora,
        optimizer=newest.optimizer or optimizer_of(None),
        user_metadata=newest.run_metadata,
        created_at=min(times),
        last_request_at=max(times),
        status="copy" if copied else "live",
    )
