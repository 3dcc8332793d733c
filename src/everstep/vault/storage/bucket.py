"""Buckets: opens one by its URL with obstore, and checks that it can hold a vault."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from everstep.vault.errors import StoreFailed, VaultError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
RETRY_SECONDS = 120.0
_MAX_RETRIES = 1000
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_PROBE = "probe/"


def library() -> Any:
    """Import obstore, or raise `VaultError` if it isn't installed."""
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise VaultError(
            'A vault in a bucket needs obstore: pip install "everstep[objects]"'
        ) from error
    return obstore


def checked_url(url: str) -> str:
    """Return a bucket's URL without a trailing slash, or raise `VaultError` if it isn't one."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise VaultError(
            "A vault's URL holds no credentials and no options; both are taken from the "
            "environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …)."
        )
    inside = parts.path.strip("/")
    unsound = inside and not {"", ".", ".."}.isdisjoint(inside.split("/"))
    if parts.scheme not in SCHEMES or not parts.netloc or unsound:
        raise VaultError(
            f"{url!r} is no bucket; it is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or "
            "az://CONTAINER/PREFIX."
        )
    return f"{parts.scheme}://{parts.netloc}/{inside}".rstrip("/")


def open_bucket(url: str, *, retry_seconds: float = RETRY_SECONDS) -> ObjectStore:
    """Open a bucket with the endpoint, region and credentials of the environment.

    Args:
        url: see `checked_url`.
        retry_seconds: how long a request that is not answered is retried.

    Raises:
        VaultError: obstore is not installed, or the environment lacks something.
    """
    obstore = library()
    from obstore.exceptions import BaseError

    options: dict[str, Any] = {"timeout": "1h", "read_timeout": "60s"}
    if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
        options["allow_http"] = True
    retry: Any = {
        "max_retries": _MAX_RETRIES,
        "retry_timeout": timedelta(seconds=retry_seconds),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=5),
            "base": 2.0,
        },
    }
    # Single deletions: not every store that speaks S3 has the call for many.
    more: dict[str, Any] = {"disable_bulk_delete": True} if url.startswith("s3:") else {}
    try:
        opened: ObjectStore = obstore.store.from_url(
            url, client_options=options, retry_config=retry, **more
        )
    except (BaseError, ValueError) as error:
        raise StoreFailed.of(url, "open", error) from None
    return opened


def probe(store: ObjectStore, url: str) -> None:
    """Check that a store supports the commit protocol, or raise `StoreFailed`.

    Creates a key twice. The store has to refuse the second put and to return the bytes and
    metadata of the first.
    """
    obstore = library()
    from obstore.exceptions import AlreadyExistsError, BaseError

    path, mark = _PROBE + uuid.uuid4().hex, {"everstepnonce": "first"}
    try:
        obstore.put(store, path, b"first", mode="create", use_multipart=False, attributes=mark)
        try:
            obstore.put(store, path, b"second", mode="create", use_multipart=False)
            refused = False
        except AlreadyExistsError:
            refused = True
        found = obstore.get(store, path)
        whole = bytes(found.bytes()) == b"first"
        marked = found.attributes.get("everstepnonce") == "first"
        listed = [each["path"] for each in obstore.list(store, _PROBE.rstrip("/")).collect()]
        obstore.delete(store, path)
    except FileNotFoundError:
        raise StoreFailed(
            f"{url}: there is no such bucket, or it does not return an object that was just put"
        ) from None
    except BaseError as error:
        raise StoreFailed.of(url, "the check at the start", error) from None
    if not (refused and whole):
        raise StoreFailed(
            f"{url}: the store does not honour conditional puts (If-None-Match: *): it let one key "
            "be created twice. A vault there could lose checkpoints; use another store."
        )
    if not marked or path not in listed:
        raise StoreFailed(
            f"{url}: the store does not list an object that was just put, or loses its metadata. "
            "Use one that is strongly consistent and keeps metadata."
        )
