"""``everstep vault rebuild``: the index of checkpoints, and what is known of runs, from manifests.

What the vault doesn't know is lost with the database: operations and futures that were not yet part
of a checkpoint or snapshot, sessions, samplers, tokens, the audit log. A run goes on from its
newest state. Lifetimes, publication and tags are those of the marks; an unnamed sampler save stays
unlisted, and is collected, as its session is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from everstep.cli import output
from everstep.cli import vault_tables as tables
from everstep.cli.errors import Refused
from everstep.cli.options import existing_home
from everstep.ledger import Checkpoint, Ledger, Run
from everstep.runtime import Settings
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.runtime.payloads import optimizer_of
from everstep.runtime.snapshots import KIND
from everstep.vault import CheckpointId, CheckpointQuarantined, Manifest, Vault, open_vault
from everstep.vault.keys import KINDS
from everstep.vault.location import settle, url_of
from everstep.vault.verify import Report, verify

_INFIX = ":train:"


@dataclass
class Rebuilt:
    """What was made anew.

    Attributes:
        runs: rows of runs that were inserted.
        checkpoints: rows of checkpoints that were inserted.
        unknown_runs: runs whose manifests don't know enough for a row.
        report: of the verification before it.
    """

    report: Report
    runs: int = 0
    checkpoints: int = 0
    unknown_runs: list[str] = field(default_factory=list)


def rebuild(home: Path, vault_url: str | None, as_json: bool) -> bool:
    """Make the index anew; print what came of it.

    Args:
        home: the home; no service may have it.
        vault_url: the bucket that its vault lies in. A home that isn't there is made, and takes
            over what lies there of a home that was lost.
        as_json: print JSON.

    Returns:
        Whether nothing is damaged. What is, is not in the index.
    """
    if vault_url is None or (home.expanduser() / "vault").is_dir():
        home = existing_home(home, vault_url if url_of(home.expanduser()) else None)
    else:
        home = home.expanduser().resolve()
        home.mkdir(parents=True, exist_ok=True)
    wal = home / "ledger.sqlite-wal"
    if wal.exists() and not (home / "ledger.sqlite").exists():
        raise Refused(f"{wal} lies there without its database; move it away, then rebuild.")
    done = asyncio.run(_rebuild(home, vault_url, as_json))
    if as_json:
        content = tables.report_json(done.report, [])
        content |= {"runs": done.runs, "recreated": done.checkpoints}
        output.print_json(content | {"unknown_runs": done.unknown_runs})
        return done.report.ok
    out = output.console()
    if done.report.damaged:
        tables.print_damaged(done.report.damaged)
    out.print(
        f"{output.counted(done.checkpoints, 'checkpoint')} and {output.counted(done.runs, 'run')} "
        "are back in the index."
    )
    if done.unknown_runs:
        out.print("Not enough is known of the runs " + ", ".join(done.unknown_runs))
    return done.report.ok


async def _rebuild(home: Path, vault_url: str | None, quiet: bool) -> Rebuilt:
    ledger = await Ledger.open(home / "ledger.sqlite", anew=True)
    try:
        settle(home, vault_url, adopt=vault_url is not None)
        vault = open_vault(home, writer=False)
        with output.progress_bar("verifying", quiet=quiet) as progress:
            done = Rebuilt(verify(vault, progress=progress))
        damaged = {each for damage in done.report.damaged for each in damage.checkpoints}
        by_run: dict[str, list[Manifest]] = defaultdict(list)
        for manifest in _sound(vault, damaged):
            by_run[manifest.run_id].append(manifest)
        rows = [row for manifests in by_run.values() for row in map(_row, manifests) if row]
        runs = {run_id: _run(run_id, manifests) for run_id, manifests in by_run.items()}
        done.unknown_runs = sorted(run_id for run_id, run in runs.items() if run is None)
        done.runs, done.checkpoints = await ledger.recreate(filter(None, runs.values()), rows)
        await Checkpoints(ledger, vault, Settings()).follow_quarantine()
        return done
    finally:
        await ledger.close()


def _sound(vault: Vault, damaged: set[CheckpointId]) -> list[Manifest]:
    """All checkpoints and snapshots that can be loaded."""
    found = []
    for each in (CheckpointId(kind, *names) for kind in KINDS for names in vault.names(kind)):
        if each not in damaged:
            with contextlib.suppress(CheckpointQuarantined):
                found.append(vault.marked(vault.manifest(*each)))
    return found


def _row(manifest: Manifest) -> Checkpoint | None:
    """A checkpoint's row; None for a snapshot, which is not in the index."""
    path = path_of(manifest.id)
    if path is None:
        return None
    return Checkpoint(
        path=path,
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
    """A run's row; None unless its session is known and a state with its optimizer is there.

    A run none of whose states was made by an operation of its own holds copies or imports.
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
