"""Downloads: signed URLs, ranges, tars, and damaged files."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pyrage
import pytest
from blake3 import blake3

from everstep.engine import Model
from everstep.vault import Vault
from everstep.vault.storage.keys import blob_key
from tests.runtime.local import Local
from tests.server.test_publication import later, listed, route

ADAPTER = "adapter_model.safetensors"
PEFT = ["adapter_config.json", ADAPTER]
KEY = pyrage.x25519.Identity.generate()


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico, min_ttl_seconds=1) as service:
        yield service


@pytest.fixture
def run(local: Local) -> str:
    run = local.new_run()
    local.train(run, 1)
    return run


def external(local: Local, run: str, name: str = "e", **body: Any) -> Any:
    return local.do(run, "save_weights_external", path=name, **body)


def urls(local: Local, path: str) -> dict[str, str]:
    answer = local.http.get(f"{route(path)}/external_weights_urls")
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["urls"])


def fetched(local: Local, path: str) -> dict[str, bytes]:
    return {name: local.http.get(url).content for name, url in urls(local, path).items()}


def stored(home: Path, path: str) -> dict[str, bytes]:
    """Return a checkpoint's files as stored in the vault."""
    run, segment, name = path.removeprefix("tinker://").split("/")
    kind = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
    vault = Vault(home / "vault", writer=False)
    manifest = vault.manifest(kind[segment], run, name)
    return {file: bytes(vault.read(manifest, file)) for file in manifest.files}


def rot(home: Path, content: bytes, at: int = -1) -> None:
    """Flip a bit of a file in the vault."""
    path = home / "vault" / blob_key(blake3(content).hexdigest())
    path.chmod(0o644)
    changed = bytearray(content)
    changed[at] ^= 1
    path.write_bytes(changed)


# Saving


def test_downloaded_files_equal_the_saved_adapter(local: Local, run: str, home: Path) -> None:
    saved = external(local, run)
    sampler = local.do(run, "save_weights_for_sampler", path="e")["path"]
    assert saved["path"] == f"tinker://{run}/external_weights/e"
    got = fetched(local, saved["path"])
    assert sorted(got) == PEFT
    assert got == stored(home, sampler)
    assert saved["size_bytes"] == sum(map(len, got.values()))
    assert listed(local)[saved["path"]]["size_bytes"] == saved["size_bytes"]


def test_external_save_has_the_state_of_its_seq_id(local: Local, run: str, home: Path) -> None:
    first = local.send(run, "save_weights_external", path="first")
    local.train(run, 2, 3)
    second = external(local, run, "second")["path"]
    before, after = stored(home, local.result(first)["path"]), stored(home, second)
    assert before[ADAPTER] != after[ADAPTER]


def test_one_name_in_three_kinds_gives_three_checkpoints(local: Local, run: str) -> None:
    paths = [
        local.do(run, kind, path="same")["path"]
        for kind in ("save_weights", "save_weights_for_sampler", "save_weights_external")
    ]
    assert set(listed(local)) == set(paths)
    assert {each["checkpoint_type"] for each in listed(local).values()} == {
        *("training", "sampler", "external")
    }
    taken = external(local, run, "same")
    assert "already exists" in taken["error"] and "external_weights" in taken["error"]
    assert local.http.delete(route(paths[2])).status_code == 204
    assert set(listed(local)) == set(paths[:2])
    assert local.http.get(f"{route(paths[2])}/external_weights_urls").status_code == 404
    assert external(local, run, "same")["path"] == paths[2], "the name is free again"


def test_retry_returns_the_same_save(local: Local, run: str) -> None:
    body = {"path": "e", "age_encryption_recipients": [str(KEY.to_public())]}
    first = local.send(run, "save_weights_external", seq_id=3, **body)
    again = local.send(run, "save_weights_external", seq_id=3, **body)
    assert first == again
    assert local.result(first) == local.result(again)
    status, text = local.refused("save_weights_external", model_id=run, seq_id=3, path="other")
    assert (status, "seq_id 3" in text or "sequence" in text) == (400, True)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "..", "a%2Fb", "x" * 129])
def test_invalid_names_are_rejected(local: Local, run: str, name: str) -> None:
    failed = external(local, run, name)
    assert failed["category"] == "user"
    assert "one path segment" in failed["error"]


def test_external_checkpoint_is_listed_expired_and_deleted_like_any_other(
    local: Local, run: str
) -> None:
    path = external(local, run, ttl_seconds=60)["path"]
    assert external(local, run, "f", ttl_seconds=0)["category"] == "user"
    until = datetime.fromisoformat(listed(local)[path]["expires_at"])
    assert until - datetime.now(UTC) <= timedelta(seconds=60)
    assert local.http.put(f"{route(path)}/ttl", json={"ttl_seconds": 90}).status_code == 204
    assert local.http.post(f"{route(path)}/publish").status_code == 204
    assert listed(local)[path]["public"] is True
    address = urls(local, path)[ADAPTER]
    info = local.post("weights_info", tinker_path=path)
    assert (info["lora_rank"], info["is_lora"]) == (4, True)
    with later(91):
        assert listed(local) == {}
        assert local.http.get(f"{route(path)}/external_weights_urls").status_code == 404
        assert local.http.get(address).status_code == 404


def test_external_checkpoint_can_be_copied_and_downloaded_from_the_copy(
    local: Local, run: str
) -> None:
    path = external(local, run)["path"]
    copy = local.post("copy_weights", source_path=path, destination_project_id="p")["tinker_path"]
    assert copy.endswith("/external_weights/e")
    assert fetched(local, copy) == fetched(local, path)


@pytest.mark.parametrize("optimizer", [False, True])
def test_external_checkpoint_cannot_be_loaded_or_sampled(
    local: Local, run: str, optimizer: bool
) -> None:
    path = external(local, run)["path"]
    failed = local.do(run, "load_weights", path=path, optimizer=optimizer)
    assert failed["category"] == "user"
    assert "files to download" in failed["error"]
    body = {"session_id": local.session(), "sampling_session_seq_id": 0, "model_path": path}
    status, text = local.refused("create_sampling_session", **body)
    assert (status, "files to download" in text) == (404, True)


# Encryption


def ssh_key(directory: Path) -> tuple[str, Any]:
    """Return a public key in the form of its file, and the identity that decrypts for it."""
    file = directory / "key"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return file.with_suffix(".pub").read_text(), pyrage.ssh.Identity.from_buffer(file.read_bytes())


def test_each_recipient_can_decrypt_an_encrypted_checkpoint(
    local: Local, run: str, home: Path, tmp_path: Path
) -> None:
    public, ssh = ssh_key(tmp_path)
    recipients = [str(KEY.to_public()), public]
    plain = stored(home, external(local, run, "plain")["path"])
    saved = external(local, run, "sealed", age_encryption_recipients=recipients)
    got = fetched(local, saved["path"])
    assert sorted(got) == [f"{name}.age" for name in PEFT]
    assert saved["size_bytes"] == sum(map(len, got.values()))
    for identity in (KEY, ssh):
        opened = {name[:-4]: pyrage.decrypt(data, [identity]) for name, data in got.items()}
        assert opened == plain
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(got[f"{ADAPTER}.age"], [pyrage.x25519.Identity.generate()])


@pytest.mark.parametrize(
    ("recipients", "says"),
    [
        ([], "1 to 10"),
        ([str(KEY.to_public())] * 11, "1 to 10"),
        (["age1nonsense"], r"age_encryption_recipients\[0\]"),
        ([str(KEY.to_public()), "ssh-rsa AAAA"], r"age_encryption_recipients\[1\]"),
        ([str(KEY)], "public key"),
    ],
)
def test_invalid_recipients_are_rejected_and_not_stored(
    local: Local, run: str, home: Path, recipients: list[str], says: str
) -> None:
    failed = external(local, run, age_encryption_recipients=recipients)
    assert failed["category"] == "user"
    assert re.search(says, failed["error"])
    assert str(KEY) not in failed["error"]
    assert listed(local) == {}
    ledger = b"".join(path.read_bytes() for path in home.glob("ledger.sqlite*"))
    assert str(KEY).encode() not in ledger
    assert external(local, run)["path"], "the run goes on"


# Signed URLs


def test_signed_url_works_for_an_hour_and_for_one_file(
    local: Local, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = external(local, run)["path"], external(local, run, "f")["path"]
    answer = local.http.get(f"{route(path)}/external_weights_urls").json()
    expires = datetime.fromisoformat(answer["expires"])
    assert timedelta(minutes=50) < expires - datetime.now(UTC) <= timedelta(hours=1)
    address = httpx.URL(answer["urls"][ADAPTER])
    assert local.http.get(str(address)).status_code == 200
    for changed in (
        str(address).replace("/e/", "/f/"),
        str(address).replace(ADAPTER, "adapter_config.json"),
        str(address.copy_set_param("expires", "9999999999")),
        str(address.copy_set_param("tag", "0" * 64)),
        str(address.copy_set_param("signature", "0" * 64)),
    ):
        assert local.http.get(changed).status_code == 403, changed
    assert local.http.get(str(address).split("?")[0]).status_code == 400
    assert other in listed(local)
    monkeypatch.setattr(
        "everstep.runtime.checkpoints.signed_urls.time.time", lambda: expires.timestamp() + 1
    )
    answer = local.http.get(str(address))
    assert (answer.status_code, "expired" in answer.json()["detail"]) == (403, True)


def test_signed_url_is_invalid_once_its_bytes_are_gone(local: Local, run: str) -> None:
    path = external(local, run)["path"]
    address = urls(local, path)[ADAPTER]
    local.http.delete(route(path))
    assert local.http.get(address).status_code == 404
    local.train(run, 2)
    assert external(local, run)["path"] == path
    answer = local.http.get(address)
    assert (answer.status_code, "replaced" in answer.json()["detail"]) == (404, True)


def test_checkpoint_without_external_files_has_no_urls(local: Local, run: str) -> None:
    training = local.do(run, "save_weights", path="a")["path"]
    for path in (training, training.replace("/weights/", "/external_weights/")):
        answer = local.http.get(f"{route(path)}/external_weights_urls")
        assert answer.status_code == 404, answer.text
    answer = local.http.get(f"training_runs/{run}/checkpoints/external_weights/a%20b/archive")
    assert answer.status_code == 400


def test_token_gives_access_to_its_checkpoint_only(local: Local, run: str) -> None:
    path, other = external(local, run)["path"], external(local, run, "f")["path"]
    token = local.post("everstep/weights_access_tokens", tinker_path=path)["weights_access_token"]
    header = {"x-tinker-weights-access-token": token}
    for ending in ("external_weights_urls", "archive"):
        accept = {**header, "accept": "application/json"}
        assert local.http.get(f"{route(path)}/{ending}", headers=accept).status_code == 200
        assert local.http.get(f"{route(other)}/{ending}", headers=accept).status_code == 404
    local.http.post(f"{route(other)}/publish")
    answer = local.http.get(f"{route(other)}/external_weights_urls", headers=header)
    assert answer.status_code == 200, "everyone reads what is public"
    events = local.http.get("audit").json()["entries"]
    assert [e["event"] for e in events].count("checkpoint_read") == 3, "what was given is noted"


# Ranges


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-", 0, None),
        ("bytes=5-9", 5, 10),
        ("bytes=0-0", 0, 1),
        ("bytes=7-999999999", 7, None),
        ("bytes=-6", -6, None),
        ("bytes=-999999999", 0, None),
        ("bytes = 5 - 9", 5, 10),
    ],
)
def test_range_returns_the_requested_bytes(
    local: Local, run: str, asked: str, start: int, stop: int | None
) -> None:
    address = urls(local, external(local, run)["path"])[ADAPTER]
    whole = local.http.get(address)
    assert whole.headers["content-length"] == str(len(whole.content))
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["etag"] == f'"{blake3(whole.content).hexdigest()}"'
    digest = base64.b64encode(hashlib.sha256(whole.content).digest()).decode()
    assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
    part = local.http.get(address, headers={"range": asked})
    wanted = whole.content[start:stop]
    assert (part.status_code, part.content) == (206, wanted)
    size = len(whole.content)
    first = size + start if start < 0 else start
    assert part.headers["content-range"] == f"bytes {first}-{first + len(wanted) - 1}/{size}"
    assert part.headers["content-length"] == str(len(wanted))
    assert part.headers["repr-digest"] == whole.headers["repr-digest"]


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "lines=0-1", "bytes=", "bytes=9-5", "x"])
def test_unsupported_ranges_return_everything(local: Local, run: str, asked: str) -> None:
    address = urls(local, external(local, run)["path"])["adapter_config.json"]
    whole = local.http.get(address).content
    answer = local.http.get(address, headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, whole)


def test_range_after_the_end_is_rejected(local: Local, run: str) -> None:
    address = urls(local, external(local, run)["path"])[ADAPTER]
    size = len(local.http.get(address).content)
    for asked in (f"bytes={size}-", f"bytes={size + 5}-{size + 9}", "bytes=-0"):
        answer = local.http.get(address, headers={"range": asked})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


def test_range_of_changed_content_returns_everything(local: Local, run: str) -> None:
    address = urls(local, external(local, run)["path"])[ADAPTER]
    whole = local.http.get(address)
    ours = {"range": "bytes=5-", "if-range": whole.headers["etag"]}
    assert local.http.get(address, headers=ours).content == whole.content[5:]
    for other in ('"other"', f"W/{whole.headers['etag']}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        answer = local.http.get(address, headers={"range": "bytes=5-", "if-range": other})
        assert (answer.status_code, answer.content) == (200, whole.content)


# Tars


@pytest.mark.parametrize("kind", ["save_weights", "save_weights_for_sampler"])
def test_archive_is_a_tar_of_the_checkpoint(local: Local, run: str, home: Path, kind: str) -> None:
    path = local.do(run, kind, path="a")["path"]
    files = stored(home, path)
    both = [("accept", "application/json"), ("accept", "application/gzip")]  # as 0.18 sends it
    moved = local.http.get(f"{route(path)}/archive", headers=both, follow_redirects=False)
    assert moved.status_code == 302
    assert parsedate_to_datetime(moved.headers["expires"]) > datetime.now(UTC)
    link = local.http.get(f"{route(path)}/archive", headers={"accept": "application/json"}).json()
    assert datetime.fromisoformat(link["expires"]) - datetime.now(UTC) > timedelta(minutes=5)
    whole = local.http.get(link["url"])
    assert whole.content == local.http.get(moved.headers["location"]).content
    assert whole.headers["content-length"] == str(len(whole.content))
    with tarfile.open(fileobj=io.BytesIO(whole.content)) as tar:
        members = tar.getmembers()
        found = {each.name: tar.extractfile(each).read() for each in members}  # type: ignore[union-attr]
    assert [each.name for each in members][-1] == "checkpoint_complete"
    assert found.pop("checkpoint_complete") == b""
    if kind == "save_weights":
        assert b'"step": 1' in found.pop("manifest.json")
    assert found == files
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.type) for m in members} == {
        (0, 0, 0, "", "", tarfile.REGTYPE)
    }


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700, 40_000, 2_000_000_000])
def test_interrupted_tar_download_can_be_resumed(local: Local, run: str, cut: int) -> None:
    path = local.do(run, "save_weights", path="a")["path"]

    def address() -> str:
        accept = {"accept": "application/json"}
        return str(local.http.get(f"{route(path)}/archive", headers=accept).json()["url"])

    whole = local.http.get(address())
    rest = {"range": f"bytes={cut}-", "if-range": whole.headers["etag"]}
    answer = local.http.get(address(), headers=rest)
    if cut >= len(whole.content):
        assert answer.status_code == 416
    else:
        assert (answer.status_code, answer.content) == (206, whole.content[cut:])


# Damaged files


@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
def test_damaged_file_is_quarantined_and_not_served(
    local: Local, run: str, home: Path, at: int
) -> None:
    path = external(local, run)["path"]
    addresses = urls(local, path)
    rot(home, stored(home, path)[ADAPTER], at)
    for _ in range(2):
        answer = local.http.get(addresses[ADAPTER])
        assert answer.status_code == 404
        assert "hash" in answer.json()["detail"]
    assert path not in listed(local)
    assert local.http.get(f"{route(path)}/external_weights_urls").status_code == 404


def test_file_damaged_during_a_download_is_never_complete(
    local: Local, run: str, home: Path
) -> None:
    path = external(local, run)["path"]
    address, content = urls(local, path)[ADAPTER], stored(home, path)[ADAPTER]
    assert local.http.get(address).content == content, "its blocks are known from now on"
    rot(home, content)
    with pytest.raises(Exception, match="changed after it was verified"):
        local.http.get(address, headers={"range": "bytes=-1"})


def test_missing_file_is_reported(local: Local, run: str, home: Path) -> None:
    path = external(local, run)["path"]
    address, content = urls(local, path)[ADAPTER], stored(home, path)[ADAPTER]
    (home / "vault" / blob_key(blake3(content).hexdigest())).unlink()
    answer = local.http.get(address)
    assert (answer.status_code, "is missing" in answer.json()["detail"]) == (404, True)
