"""Where a home's vault lies: in a directory of the home, or in a bucket.

    <home>/vault/             the directory; with a bucket, what processes lock each other out by
    <home>/vault.json         the bucket's URL and the vault's id; absent: the directory it is
    <bucket>/home.json/…      the id of the vault that lies there

A bucket belongs to one home: two that collect there would take each other's files. The home's file
is written first, then the bucket is claimed with its id, so that whoever dies in between goes on.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from everstep.vault.bucket import RETRY_SECONDS, checked_url, open_bucket, probe
from everstep.vault.errors import CheckpointDamaged, VaultElsewhere, VaultError
from everstep.vault.keys import BLOBS, MANIFESTS
from everstep.vault.local import sync_directory, write_synced
from everstep.vault.objects import ObjectStorage
from everstep.vault.vault import Vault

FILE = "vault.json"
_CLAIM = "home.json"
_IMPATIENT_SECONDS = 10.0


@dataclass(frozen=True)
class _Place:
    url: str
    id: str


def open_vault(
    home: Path,
    *,
    writer: bool = True,
    reserve_bytes: int = 0,
    retry_seconds: float = RETRY_SECONDS,
) -> Vault:
    """Open the vault of a home, wherever `settle` has put it.

    Args:
        home: the home.
        writer: see `Vault`.
        reserve_bytes: see `Vault`; a bucket has no bound.
        retry_seconds: for how long a bucket that doesn't answer is asked again.

    Raises:
        VaultError: the home's ``vault.json`` can't be read, or obstore is not installed.
        VaultElsewhere: another home has taken what lies there over.
        StoreFailed: the bucket does not answer.
    """
    root = home / "vault"
    place = _place(home)
    if place is None:
        return Vault(root, writer=writer, reserve_bytes=reserve_bytes)
    (root / "tmp").mkdir(parents=True, exist_ok=True)  # for the locks
    storage = ObjectStorage(open_bucket(place.url, retry_seconds=retry_seconds), place.url)
    _check_free(storage, place, home)
    return Vault(root, writer=writer, storage=storage)


def url_of(home: Path) -> str | None:
    """The bucket that a home's vault lies in; None: in its directory."""
    place = _place(home)
    return None if place is None else place.url


def check(home: Path, url: str | None) -> None:
    """Raise `VaultElsewhere` unless a home's vault lies where that says, or nothing is said."""
    there = url_of(home) or str(home / "vault")
    if url is not None and checked_url(url) != there:
        raise VaultElsewhere(
            f"The vault of {home} is {there}, not {checked_url(url)}. Leave --vault out, or choose "
            "another --home."
        )


def settle(home: Path, url: str | None, *, adopt: bool = False) -> None:
    """Have a home's vault lie in a bucket from now on; try whether it can.

    Args:
        home: the home, which no other process may be at.
        url: ``s3://BUCKET/PREFIX``, ``gs://…`` or ``az://…``; None: where it lies already.
        adopt: take over what lies there of a home that was lost.

    Raises:
        VaultElsewhere: the home has another vault, or what lies there is another home's.
        StoreFailed: the store does not answer, or does not keep what the vault needs.
    """
    place = _place(home)
    if place is not None or _has_files(home):
        check(home, url)
    elif url is not None:
        place = _Place(checked_url(url), uuid.uuid4().hex)
    if place is None:
        return
    store = open_bucket(place.url, retry_seconds=_IMPATIENT_SECONDS)
    probe(store, place.url)
    storage = ObjectStorage(store, place.url)
    if not adopt:
        _check_free(storage, place, home)
    if _place(home) is None:
        _remember(home, place)
    claim = json.dumps({"vault": place.id}).encode()
    if adopt or _claimed(storage) is None:
        try:
            storage.write([claim], lambda: _CLAIM, replace=adopt)
        except FileExistsError:
            _check_free(storage, place, home)
    (home / "vault" / "tmp").mkdir(parents=True, exist_ok=True)  # for the locks


def _check_free(storage: ObjectStorage, place: _Place, home: Path) -> None:
    claimed = _claimed(storage)
    if claimed not in (None, place.id):
        raise VaultElsewhere(
            f"{place.url} is the vault of another home than {home}. Choose another prefix; or, if "
            "that home is lost, take its vault over: everstep vault rebuild --vault "
            f"{place.url} --home {home}"
        )


def _has_files(home: Path) -> bool:
    """Whether checkpoints lie in a home's directory."""
    return any((home / "vault" / name).exists() for name in (BLOBS, MANIFESTS))


def _claimed(storage: ObjectStorage) -> str | None:
    try:
        found = json.loads(bytes(storage.read(_CLAIM)))["vault"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{_CLAIM} can't be read: {error!r}", _CLAIM) from error
    return str(found)


def _place(home: Path) -> _Place | None:
    path = home / FILE
    try:
        return _Place(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise VaultError(
            f"{path} can't be read: {error}. It says in which bucket the vault lies; write it "
            "anew with 'everstep vault rebuild --vault URL', after moving it away."
        ) from error


def _remember(home: Path, place: _Place) -> None:
    temporary = home / f".{FILE}"
    temporary.unlink(missing_ok=True)  # of a start that was killed
    write_synced(temporary, [json.dumps(vars(place), indent=1).encode()])
    temporary.replace(home / FILE)
    sync_directory(home)
