"""Backups of a home, also beside its service.

A backup made beside a running service is consistent: it is a state that a crash could have left at
the moment at which the ledger was copied, and the service recovers from every crash.

1. From its first step to its last the backup holds the vault (`Vault.gc_paused`). Every collection
   honours this lock, so no file that a manifest has named since then is removed.
2. Manifests are read, the ledger is copied in one transaction, and manifests are read again. Each
   checkpoint in the copy was saved before it (data and manifest are durable before the row), so it
   is seen by the first or the second read. A checkpoint that was saved and deleted in between is
   seen by neither: then the ledger is copied again.
3. Of a checkpoint that was overwritten in the meantime, the newest state that the copy knows is
   taken: it existed before the copy, or the operation that made it is in the copy. It is not older
   than the save that the copy has recorded. If only an older or a newer state was seen, the ledger
   is copied again. So no state is ahead of the ledger, and a restored run finds each operation
   after its state.
4. Segments of the payload log that the copy names are durable before its rows. One that the service
   drops before it is copied is named by no row any more: then the ledger is copied again.
5. A save that the copy has accepted and not finished is repeated by the restored service.

Two things are required of the service: data and manifest are durable before the row, and it
collects only through `Vault.collect`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from everstep.cli.common import output
from everstep.cli.common.errors import Refused
from everstep.cli.common.progress_bars import progress_bar
from everstep.cli.vault import tables
from everstep.ledger import Checkpoint
from everstep.ledger.sqlite.copy import DatabaseCopy, check_database, copy_database
from everstep.runtime.checkpoints.catalog import id_of
from everstep.runtime.maintenance.gc import SAVES
from everstep.vault import (
    FileRef,
    Manifest,
    Vault,
    open_vault,
)
from everstep.vault.backup import DATABASE, BackupDirectory, BackupNote, file_ref
from everstep.vault.manifest_history import ManifestHistory
from everstep.vault.storage.base import Storage
from everstep.vault.storage.keys import MANIFESTS, blob_key

_ATTEMPTS = 5


def create_backup(home: Path, directory: Path, *, link: bool, keep: int, as_json: bool) -> bool:
    """Make a backup, verify it and print a summary.

    Args:
        home: the home. A service may run on it.
        directory: directory of the backups. Files of earlier ones are not transferred again.
        link: share files with the home by hard links if both are on one file system.
        keep: number of backups to keep in the directory, once one is complete.
        as_json: print JSON.

    Returns:
        Whether the backup is complete. Damaged checkpoints are left out and printed.

    Raises:
        Refused: the directory lies in the home.
    """
    if directory == home or directory.is_relative_to(home):
        raise Refused(f"{directory} lies in the home that is backed up; choose another directory.")
    vault = open_vault(home, writer=False)
    with (
        contextlib.closing(BackupDirectory(directory)) as backups,
        vault.gc_paused(),
        backups.stage() as stage,
    ):
        now = datetime.now(UTC)
        chosen, left_out, segments = _choose(backups, vault, home / DATABASE, stage / DATABASE)
        with progress_bar("backing up", quiet=as_json) as progress:
            damaged = _transfer(backups, vault.storage, chosen, link, progress)
        for each in [each for each in chosen if not damaged.keys().isdisjoint(_digests(each))]:
            reasons = (f"{blob_key(d)}: {damaged[d]}" for d in _digests(each) if d in damaged)
            left_out[tables.display_name(each.id)] = "; ".join(reasons)
            chosen.remove(each)
        _drop(stage / DATABASE, left_out)
        files = {ref.blake3: ref for each in chosen for ref in each.files.values()}
        note = BackupNote(
            id=backups.next_id(now),
            made_at=now,
            checkpoints=len(chosen),
            files=len(files),
            size=sum(ref.size for ref in files.values()),
            ledger=file_ref(stage / DATABASE),
            left_out=left_out,
            segments=segments,
        )
        backups.finish(stage, note, [vault.with_metadata(each) for each in chosen])
        backups.check(note.id)
        check_database(backups.of(note.id) / DATABASE)
        if not left_out:  # otherwise an earlier backup may hold the only intact copy
            backups.prune(keep)
    _print_backup(note, backups.of(note.id), as_json)
    return not left_out


def _choose(
    backups: BackupDirectory, vault: Vault, database: Path, copy: Path
) -> tuple[list[Manifest], dict[str, str], dict[str, FileRef]]:
    """Copy the ledger, and the segments of its payload log.

    Returns:
        The manifests that belong to it, what is left out with the reason, and the segments.
    """
    seen = ManifestHistory()
    for attempt in range(_ATTEMPTS):
        seen.scan(vault.storage.keys(MANIFESTS), lambda each: vault.manifest(*each))
        copy.unlink(missing_ok=True)
        copy_database(database, copy)
        seen.scan(vault.storage.keys(MANIFESTS), lambda each: vault.manifest(*each))
        with contextlib.closing(DatabaseCopy(copy)) as ledger:
            chosen, missing = _belonging(seen, ledger)
            segments, gone = _take_segments(backups, ledger.segments(database))
            known = seen.damaged.keys() >= {id_of(row) for row in missing}
            if attempt == _ATTEMPTS - 1 or (known and not gone):
                break
    now = datetime.now(UTC)
    with contextlib.closing(DatabaseCopy(copy)) as ledger:
        for row in missing:
            ledger.delete_checkpoint(row.path)
    lost = [row for row in missing if row.expires_at is None or row.expires_at > now]
    left_out = {row.path: seen.damaged.get(id_of(row), "its manifest is missing") for row in lost}
    snapshots = {each: text for each, text in seen.damaged.items() if each.kind == "snapshot"}
    left_out |= {tables.display_name(each): text for each, text in snapshots.items()}
    return chosen, left_out | gone, segments


def _take_segments(
    backups: BackupDirectory, paths: list[Path]
) -> tuple[dict[str, FileRef], dict[str, str]]:
    """Copy segments of the payload log. Returns them, and those that are gone, by name."""
    taken, gone = {}, {}
    for path in paths:
        try:
            taken[path.name] = backups.take_file(path)
        except FileNotFoundError:
            gone[path.name] = "this segment of the payload log is missing"
    return taken, gone


def _belonging(
    seen: ManifestHistory, ledger: DatabaseCopy
) -> tuple[list[Manifest], list[Checkpoint]]:
    """Match the manifests with the copied ledger. Returns them, and the rows without one."""
    positions = ledger.last_seq_ids()

    def accepted(manifest: Manifest) -> bool:
        return manifest.request_id is not None and ledger.has_operation(manifest.request_id)

    def reached(manifest: Manifest) -> bool:
        return manifest.position <= positions.get(manifest.run_id, -1)

    rows = {id_of(row): row for row in ledger.checkpoints()}
    saved = ledger.last_saves(SAVES)
    found = [seen.newest(each, accepted) for each in rows]
    found = [each for each in found if each and each.position >= saved.get(each.id, -1)]
    found += [seen.newest(each, reached) for each in seen if each.kind == "snapshot"]
    chosen = [each for each in found if each is not None]
    return chosen, [row for each, row in rows.items() if each not in {one.id for one in chosen}]


def _transfer(
    backups: BackupDirectory,
    source: Storage,
    manifests: list[Manifest],
    link: bool,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Transfer and verify all files. Returns the damage, by hash."""
    files: dict[str, FileRef] = {r.blake3: r for each in manifests for r in each.files.values()}
    total = sum(ref.size for ref in files.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    reasons = {
        digest: backups.take(source, ref, link=link, on_read=advance)
        for digest, ref in files.items()
    }
    return {digest: reason for digest, reason in reasons.items() if reason is not None}


def _drop(copy: Path, left_out: dict[str, str]) -> None:
    """Delete the rows of the omitted checkpoints from the copied ledger."""
    with contextlib.closing(DatabaseCopy(copy)) as ledger:
        for path in left_out:
            ledger.delete_checkpoint(path)


def _digests(manifest: Manifest) -> set[str]:
    return {ref.blake3 for ref in manifest.files.values()}


def _print_backup(note: BackupNote, path: Path, as_json: bool) -> None:
    if as_json:
        output.print_json({"path": str(path), **note.model_dump(mode="json")})
        return
    out = output.console()
    if note.left_out:
        tables.print_remarks("Left out", note.left_out.items())
        out.print("Earlier backups are kept; they may hold them.")
    out.print(
        f"{path}: {note.checkpoints} checkpoints and snapshots, {note.files} files, "
        f"{output.size_text(note.size)}, verified."
    )
