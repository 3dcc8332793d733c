"""``everstep backup`` and ``everstep restore``.

Why a backup that is made beside a running service is consistent. It is what a crash could have
left at the moment at which the ledger was copied, and the service recovers from every crash:

1. From its first step to its last the backup holds the vault (`Vault.held`), a lock that every
   collection honours: no file that any manifest named since then goes away.
2. Manifests are read, then the ledger is copied in one transaction, then manifests are read
   again. What the copy lists was saved before it (data and manifest are durable before the row
   is), so that it was there at the first look or at the second, unless it was saved and deleted
   in the time between: then the ledger is copied again.
3. Of a checkpoint that was overwritten meanwhile, the newest state is taken that the copy knows
   of: it was there before the copy, or the operation that made it is in the copy. It is not older
   than what the copy has as saved; where only an older or a newer one was seen, the ledger is
   copied again. So no state is ahead of the ledger, and a run that is brought back finds each
   operation after its state.
4. A save that the copy has as accepted and not as done is made again by whoever starts on it.

What is asked of the service: that data and manifest are durable before the row; that it collects
only through `Vault.collect`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from everstep.cli import output
from everstep.cli import vault_tables as tables
from everstep.cli.errors import Refused
from everstep.ledger import Checkpoint
from everstep.ledger.copying import Copy, check_database, copy_database
from everstep.runtime.upkeep import SAVES
from everstep.vault import (
    CheckpointDamaged,
    CheckpointId,
    FileRef,
    Manifest,
    Vault,
    open_vault,
)
from everstep.vault.backup import DATABASE, BackupDirectory, BackupNote, file_ref
from everstep.vault.keys import MANIFESTS, blob_key
from everstep.vault.local import sync_directory, write_synced
from everstep.vault.room import readable
from everstep.vault.sightings import Sightings
from everstep.vault.storage import Storage
from everstep.vault.verify import verify

_ATTEMPTS = 5


def backup(home: Path, directory: Path, *, link: bool, keep: int, as_json: bool) -> bool:
    """Make a backup, verify it and print what it is.

    Args:
        home: the home; a service may have it.
        directory: where backups go; files that earlier ones brought are not brought again.
        link: share files with the home where both are on one file system.
        keep: how many backups the directory holds at most, once one has everything.
        as_json: print JSON.

    Returns:
        Whether it has everything. What is damaged is left out, and named.

    Raises:
        Refused: the directory lies in the home.
    """
    if directory == home or directory.is_relative_to(home):
        raise Refused(f"{directory} lies in the home that is to be kept; choose another directory.")
    vault = open_vault(home, writer=False)
    with (
        contextlib.closing(BackupDirectory(directory)) as place,
        vault.held(),
        place.stage() as stage,
    ):
        now = datetime.now(UTC)
        chosen, left_out = _choose(vault, home / DATABASE, stage / DATABASE)
        with output.progress_bar("backing up", quiet=as_json) as progress:
            damaged = _take(place, vault.storage, chosen, link, progress)
        for each in [each for each in chosen if not damaged.keys().isdisjoint(_digests(each))]:
            reasons = (f"{blob_key(d)}: {damaged[d]}" for d in _digests(each) if d in damaged)
            left_out[tables.called(each.id)] = "; ".join(reasons)
            chosen.remove(each)
        _drop(stage / DATABASE, left_out)
        files = {ref.blake3: ref for each in chosen for ref in each.files.values()}
        note = BackupNote(
            id=place.next_id(now),
            made_at=now,
            checkpoints=len(chosen),
            files=len(files),
            size=sum(ref.size for ref in files.values()),
            ledger=file_ref(stage / DATABASE),
            left_out=left_out,
        )
        place.finish(stage, note, [vault.marked(each) for each in chosen])
        place.check(note.id)
        check_database(place.of(note.id) / DATABASE)
        if not left_out:  # else an earlier one may be all that is left of it
            place.prune(keep)
    _print_backup(note, place.of(note.id), as_json)
    return not left_out


def _choose(vault: Vault, database: Path, copy: Path) -> tuple[list[Manifest], dict[str, str]]:
    """Copy the ledger; returns the manifests that belong to it, and what it lists without one."""
    seen = Sightings()
    for attempt in range(_ATTEMPTS):
        seen.look(vault.storage.keys(MANIFESTS), lambda each: vault.manifest(*each))
        copy.unlink(missing_ok=True)
        copy_database(database, copy)
        seen.look(vault.storage.keys(MANIFESTS), lambda each: vault.manifest(*each))
        with contextlib.closing(Copy(copy)) as ledger:
            chosen, missing = _belonging(seen, ledger)
            if attempt == _ATTEMPTS - 1 or seen.damaged.keys() >= {_id(row) for row in missing}:
                break
    now = datetime.now(UTC)
    with contextlib.closing(Copy(copy)) as ledger:
        for row in missing:
            ledger.drop(row.path)
    lost = [row for row in missing if row.expires_at is None or row.expires_at > now]
    left_out = {row.path: seen.damaged.get(_id(row), "its manifest is missing") for row in lost}
    snapshots = {each: text for each, text in seen.damaged.items() if each.kind == "snapshot"}
    return chosen, left_out | {tables.called(each): text for each, text in snapshots.items()}


def _belonging(seen: Sightings, ledger: Copy) -> tuple[list[Manifest], list[Checkpoint]]:
    """The manifests that the copied ledger knows of, and its rows that have none."""
    positions = ledger.positions()

    def accepted(manifest: Manifest) -> bool:
        return manifest.request_id is not None and ledger.knows(manifest.request_id)

    def reached(manifest: Manifest) -> bool:
        return manifest.position <= positions.get(manifest.run_id, -1)

    rows = {_id(row): row for row in ledger.checkpoints()}
    saved = ledger.last_saves(SAVES)
    found = [seen.newest(each, accepted) for each in rows]
    found = [each for each in found if each and each.position >= saved.get(each.id, -1)]
    found += [seen.newest(each, reached) for each in seen if each.kind == "snapshot"]
    chosen = [each for each in found if each is not None]
    return chosen, [row for each, row in rows.items() if each not in {one.id for one in chosen}]


def _take(
    place: BackupDirectory,
    source: Storage,
    manifests: list[Manifest],
    link: bool,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Have all files in the backup's directory, verified; returns what is wrong, by hash."""
    files: dict[str, FileRef] = {r.blake3: r for each in manifests for r in each.files.values()}
    total = sum(ref.size for ref in files.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    reasons = {
        digest: place.take(source, ref, link=link, on_read=advance) for digest, ref in files.items()
    }
    return {digest: reason for digest, reason in reasons.items() if reason is not None}


def _drop(copy: Path, left_out: dict[str, str]) -> None:
    """Take what was left out from the copied index as well."""
    with contextlib.closing(Copy(copy)) as ledger:
        for path in left_out:
            ledger.drop(path)


def _digests(manifest: Manifest) -> set[str]:
    return {ref.blake3 for ref in manifest.files.values()}


def _id(row: Checkpoint) -> CheckpointId:
    return CheckpointId(row.kind, row.run_id, row.name)


def _print_backup(note: BackupNote, path: Path, as_json: bool) -> None:
    if as_json:
        output.print_json({"path": str(path), **note.model_dump(mode="json")})
        return
    out = output.console()
    if note.left_out:
        tables.print_remarks("Left out", note.left_out.items())
        out.print("Earlier backups are kept; they may have it.")
    out.print(
        f"{path}: {note.checkpoints} checkpoints and snapshots, {note.files} files, "
        f"{readable(note.size)}, verified."
    )


def restore(directory: Path, home: Path, *, backup_id: str | None, as_json: bool) -> None:
    """Make a home of a backup; it appears in one rename, once all of it is verified.

    Args:
        directory: holds backups.
        home: absent or empty.
        backup_id: which; None: the newest.
        as_json: print JSON.

    Raises:
        Refused: there is no such backup, or something is in the home.
        CheckpointDamaged: the backup is not what was written; nothing of it is restored.
    """
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise Refused(f"{home} is not empty; restore into a directory that is, or isn't there.")
    if not (directory / "backups").is_dir():
        raise Refused(f"{directory} holds no backup.")
    with contextlib.closing(BackupDirectory(directory)) as place:
        ids = place.ids()
        if not ids or backup_id not in (None, *ids):
            wanted = "a backup" if backup_id is None else f"backup {backup_id}"
            raise Refused(
                f"{directory} does not hold {wanted}; it holds {', '.join(ids) or 'none'}"
            )
        note = place.note(backup_id or ids[-1])
        stage = home.with_name(f".{home.name}.restoring")
        if stage.exists():
            shutil.rmtree(stage)  # of a restore that was broken off
        try:
            with output.progress_bar("restoring", quiet=as_json) as progress:
                _fill(place, note, stage, progress)
            _appear(stage, home)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
    if as_json:
        output.print_json({"home": str(home), **note.model_dump(mode="json")})
        return
    output.console().print(
        f"{home} is restored to {note.made_at:%Y-%m-%d %H:%M:%S} UTC: {note.checkpoints} "
        f"checkpoints and snapshots, {readable(note.size)}, verified."
    )


def _fill(
    place: BackupDirectory, note: BackupNote, stage: Path, progress: Callable[[int, int], None]
) -> None:
    vault = Vault(stage / "vault")
    vault.check_room(note.size)
    there: set[str] = set()
    for manifest in place.manifests(note.id):
        for name, ref in manifest.files.items():
            if ref.blake3 not in there:
                try:
                    stored = vault.put(place.storage.chunks(blob_key(ref.blake3)))
                except FileNotFoundError as error:
                    raise CheckpointDamaged(f"{manifest.id}: {name} is missing") from error
                if stored != ref:
                    raise CheckpointDamaged(
                        f"{manifest.id}: {name} ({blob_key(ref.blake3)}) is damaged in the backup; "
                        "restore another one with --at"
                    )
                there.add(ref.blake3)
        vault.commit(manifest)
    write_synced(stage / DATABASE, place.ledger(note.id))
    check_database(stage / DATABASE)
    report = verify(vault, everything=True, progress=progress)
    if not report.ok or report.checkpoints != note.checkpoints:
        found = "; ".join(f"{each.key}: {each.reason}" for each in report.damaged)
        raise CheckpointDamaged(
            f"{report.checkpoints} of {note.checkpoints} checkpoints came back. {found}"
        )


def _appear(stage: Path, home: Path) -> None:
    sync_directory(stage)
    try:
        stage.rename(home)  # onto an empty directory, or nothing
    except OSError as error:
        raise Refused(
            f"{home} can't be put in place: {error}. If it is a mount point, restore into a "
            "directory below it."
        ) from error
    sync_directory(home.parent)
