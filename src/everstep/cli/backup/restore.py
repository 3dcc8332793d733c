"""Restores of homes from backups."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from everstep.cli.common import output
from everstep.cli.common.errors import Refused
from everstep.cli.common.progress_bars import progress_bar
from everstep.durable_files import sync_directory, write_new
from everstep.ledger.payload_log.segments import segments_path
from everstep.ledger.sqlite.copy import check_database
from everstep.vault import CheckpointDamaged, Vault
from everstep.vault.backup import DATABASE, BackupDirectory, BackupNote
from everstep.vault.storage.keys import blob_key
from everstep.vault.verify import verify


def restore_backup(directory: Path, home: Path, *, backup_id: str | None, as_json: bool) -> None:
    """Restore a home. It appears in one rename, when all of it is verified.

    Args:
        directory: directory of the backups.
        home: the home, absent or empty.
        backup_id: id of the backup, or None for the newest.
        as_json: print JSON.

    Raises:
        Refused: there is no such backup, or the home is not empty.
        CheckpointDamaged: the backup is damaged. Nothing is restored.
    """
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise Refused(f"{home} is not empty; restore into an empty or absent directory.")
    if not (directory / "backups").is_dir():
        raise Refused(f"{directory} holds no backup.")
    with contextlib.closing(BackupDirectory(directory)) as backups:
        ids = backups.ids()
        if not ids or backup_id not in (None, *ids):
            wanted = "a backup" if backup_id is None else f"backup {backup_id}"
            raise Refused(
                f"{directory} does not hold {wanted}; it holds {', '.join(ids) or 'none'}"
            )
        note = backups.note(backup_id or ids[-1])
        stage = home.with_name(f".{home.name}.restoring")
        if stage.exists():
            shutil.rmtree(stage)  # of a restore that was interrupted
        try:
            with progress_bar("restoring", quiet=as_json) as progress:
                _fill(backups, note, stage, progress)
            _rename(stage, home)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
    if as_json:
        output.print_json({"home": str(home), **note.model_dump(mode="json")})
        return
    output.console().print(
        f"{home} is restored to {note.made_at:%Y-%m-%d %H:%M:%S} UTC: {note.checkpoints} "
        f"checkpoints and snapshots, {output.size_text(note.size)}, verified."
    )


def _fill(
    backups: BackupDirectory, note: BackupNote, stage: Path, progress: Callable[[int, int], None]
) -> None:
    vault = Vault(stage / "vault")
    vault.check_free_space(note.size)
    stored_files: set[str] = set()
    for manifest in backups.manifests(note.id):
        for name, ref in manifest.files.items():
            if ref.blake3 not in stored_files:
                try:
                    stored = vault.put(backups.storage.chunks(blob_key(ref.blake3)))
                except FileNotFoundError as error:
                    raise CheckpointDamaged(f"{manifest.id}: {name} is missing") from error
                if stored != ref:
                    raise CheckpointDamaged(
                        f"{manifest.id}: {name} ({blob_key(ref.blake3)}) is damaged in the backup; "
                        "restore another one with --at"
                    )
                stored_files.add(ref.blake3)
        vault.commit(manifest)
    segments = segments_path(stage / DATABASE)
    if note.segments:
        segments.mkdir(mode=0o700)
    for name, ref in note.segments.items():
        backups.restore_file(ref, segments / Path(name).name)
    if note.segments:
        sync_directory(segments)
    write_new(stage / DATABASE, backups.ledger(note.id))
    check_database(stage / DATABASE)
    report = verify(vault, everything=True, progress=progress)
    if not report.ok or report.checkpoints != note.checkpoints:
        found = "; ".join(f"{each.key}: {each.reason}" for each in report.damaged)
        raise CheckpointDamaged(
            f"only {report.checkpoints} of {note.checkpoints} checkpoints were restored. {found}"
        )


def _rename(stage: Path, home: Path) -> None:
    sync_directory(stage)
    try:
        stage.rename(home)  # onto an empty or absent directory
    except OSError as error:
        raise Refused(
            f"{stage} can't be renamed to {home}: {error}. If it is a mount point, restore into a "
            "directory below it."
        ) from error
    sync_directory(home.parent)
