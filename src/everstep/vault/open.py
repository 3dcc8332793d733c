"""Opening a vault: in a directory of its home, or in a bucket.

    <home>/vault/             the directory. For a bucket: the locks and the gc journal
    <home>/vault.json         the bucket's URL and the vault's id. Absent for a directory
    <bucket>/home.json/…      the id of the vault in the bucket

A bucket belongs to one home, because two homes would collect each other's files. The home's file is
written first, then the bucket is claimed with its id. A start that died in between is resumed.
"""

from __future__ import annotations

import json
import shlex
import uuid
from dataclasses import dataclass
from pathlib import Path

from everstep.durable_files import replace_file
from everstep.vault.errors import CheckpointDamaged, VaultElsewhere, VaultError
from everstep.vault.storage.bucket import RETRY_SECONDS, checked_url, open_bucket, probe
from everstep.vault.storage.keys import BLOBS, MANIFESTS
from everstep.vault.storage.objects import ObjectStorage
from everstep.vault.vault import Vault

FILE = "vault.json"
_CLAIM = "home.json"
IMPATIENT_SECONDS = 10.0
"""How long requests to a bucket are retried where a user waits for the first answer."""


@dataclass(frozen=True)
class _Bucket:
    url: str
    id: str


def open_vault(
    home: Path,
    *,
    writer: bool = True,
    reserve_bytes: int = 0,
    retry_seconds: float = RETRY_SECONDS,
) -> Vault:
    """Open the vault of a home, at the location that `set_location` chose.

    Args:
        home: the home.
        writer: see `Vault`.
        reserve_bytes: see `Vault`. No effect for a bucket.
        retry_seconds: how long requests to a bucket that doesn't answer are retried.

    Raises:
        VaultError: the home's ``vault.json`` can't be read, or obstore is not installed.
        VaultElsewhere: another home has taken over the bucket.
        StoreFailed: the bucket does not answer.
    """
    root = home / "vault"
    bucket = _read_bucket(home)
    if bucket is None:
        return Vault(root, writer=writer, reserve_bytes=reserve_bytes)
    (root / "tmp").mkdir(parents=True, exist_ok=True)  # for the locks
    storage = ObjectStorage(open_bucket(bucket.url, retry_seconds=retry_seconds), bucket.url)
    _check_free(storage, bucket, home)
    return Vault(root, writer=writer, storage=storage)


def url_of(home: Path) -> str | None:
    """Return the URL of a home's bucket, or None if the vault is a directory."""
    bucket = _read_bucket(home)
    return None if bucket is None else bucket.url


def check(home: Path, url: str | None) -> None:
    """Raise `VaultElsewhere` if a home's vault has another URL than the given one, if any."""
    there = url_of(home) or str(home / "vault")
    if url is not None and checked_url(url) != there:
        raise VaultElsewhere(
            f"The vault of {home} is {there}, not {checked_url(url)}. Leave --vault out, or choose "
            "another --home."
        )


def set_location(home: Path, url: str | None, *, adopt: bool = False) -> None:
    """Put a new home's vault into a bucket, and check that the bucket can hold it.

    Args:
        home: the home. No other process may use it.
        url: ``s3://BUCKET/PREFIX``, ``gs://…`` or ``az://…``. None keeps the current location.
        adopt: take over the vault of a home that was lost.

    Raises:
        VaultElsewhere: the home has another vault, or the bucket belongs to another home.
        StoreFailed: the store does not answer, or lacks a feature that the vault needs.
    """
    bucket = _read_bucket(home)
    if bucket is not None or _has_files(home):
        check(home, url)
    elif url is not None:
        bucket = _Bucket(checked_url(url), uuid.uuid4().hex)
    if bucket is None:
        return
    store = open_bucket(bucket.url, retry_seconds=IMPATIENT_SECONDS)
    probe(store, bucket.url)
    storage = ObjectStorage(store, bucket.url)
    if not adopt:
        _check_free(storage, bucket, home)
    if _read_bucket(home) is None:
        _remember(home, bucket)
    claim = json.dumps({"vault": bucket.id}).encode()
    if adopt or _claimed(storage) is None:
        try:
            storage.write([claim], lambda: _CLAIM, replace=adopt)
        except FileExistsError:
            _check_free(storage, bucket, home)
    (home / "vault" / "tmp").mkdir(parents=True, exist_ok=True)  # for the locks


def _check_free(storage: ObjectStorage, bucket: _Bucket, home: Path) -> None:
    claimed = _claimed(storage)
    if claimed not in (None, bucket.id):
        raise VaultElsewhere(
            f"{bucket.url} is the vault of another home than {home}. Choose another prefix; or, if "
            "that home is lost, take its vault over: everstep vault rebuild --vault "
            f"{shlex.quote(bucket.url)} --home {shlex.quote(str(home))}"
        )


def _has_files(home: Path) -> bool:
    """Return whether a home's directory holds checkpoints."""
    return any((home / "vault" / name).exists() for name in (BLOBS, MANIFESTS))


def _claimed(storage: ObjectStorage) -> str | None:
    try:
        found = json.loads(bytes(storage.read(_CLAIM)))["vault"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{_CLAIM} can't be read: {error!r}", _CLAIM) from error
    return str(found)


def _read_bucket(home: Path) -> _Bucket | None:
    path = home / FILE
    try:
        return _Bucket(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise VaultError(
            f"{path} can't be read: {error}. It names the bucket of the vault; write it "
            "again with 'everstep vault rebuild --vault URL', after moving it away."
        ) from error


def _remember(home: Path, bucket: _Bucket) -> None:
    replace_file(home / FILE, json.dumps(vars(bucket), indent=1).encode())
