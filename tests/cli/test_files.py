"""``everstep checkpoint download`` and ``diff``, and ``everstep doctor``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from safetensors.numpy import load_file

import everstep
from everstep.cli.checkpoint import diff, tensor_diff
from everstep.cli.common.errors import Refused
from everstep.cli.common.target import Service as Target
from everstep.cli.doctor import home
from everstep.cli.doctor import service as doctor_service
from everstep.wire.messages.inspection import CheckpointDetailsResponse
from tests.cli.remote import KEY, failure, invoke, print_of, read_json
from tests.client.keeping_service import KeepingService
from tests.conftest import Service
from tests.promises.test_exactness import hashes
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow


@dataclass
class Saved:
    """Two training checkpoints of a run, a step apart, and a sampler checkpoint of the second."""

    url: str
    a: str
    b: str
    sampler: str


@pytest.fixture(scope="module")
def saved(service: Service) -> Saved:
    with connect(everstep, service.url) as client:
        run = client.create_lora_training_client(MODEL, 4, 1).result()
        train(everstep, run, 1)
        a = run.save_state("a").result().path
        train(everstep, run, 1)
        b = run.save_state("b", user_metadata={"loss": "0.5"}).result().path
        sampler = run.save_weights_for_sampler("b").result().path
    return Saved(service.url, a, b, sampler)


def directory(parent: Path, path: str) -> Path:
    return parent / path.removeprefix("tinker://").replace("/", "_")


def test_download_is_complete_and_intact(saved: Saved, tmp_path: Path) -> None:
    results = read_json(saved.url, "checkpoint", "download", saved.a, saved.sampler, "-o", tmp_path)
    found = [Path(each["directory"]) for each in results["results"]]
    assert found == [directory(tmp_path, saved.a), directory(tmp_path, saved.sampler)]
    assert load_file(found[0] / "adapter_model.safetensors")
    config = json.loads((found[0] / "adapter_config.json").read_text())
    assert config["r"] == 4
    code, text = failure(saved.url, "checkpoint", "download", saved.a, "-o", tmp_path)
    assert code == 1 and "--force" in text
    again = invoke(saved.url, "checkpoint", "download", saved.a, "-o", tmp_path, "--force")
    assert again.exit_code == 0 and ":train:0" in again.output, "and not a tram"
    assert failure(saved.url, "checkpoint", "download", saved.a + "0", "-o", tmp_path)[0] == 3


def test_download_resumes_after_ctrl_c(saved: Saved, tmp_path: Path) -> None:
    whole = httpx.Response.iter_raw
    begun, asked = 1 << 16, []

    def cut(self: httpx.Response, size: int | None = None) -> Iterator[bytes]:
        if isinstance(self.stream, httpx.ByteStream):  # not the download
            yield from whole(self, size)
            return
        yield next(iter(whole(self, begun)))
        raise KeyboardInterrupt

    def seen(self: httpx.Response, size: int | None = None) -> Iterator[bytes]:
        if not isinstance(self.stream, httpx.ByteStream):
            asked.append(self.request.headers.get("range"))
        yield from whole(self, size)

    words = ("checkpoint", "download", saved.a, "-o", tmp_path)
    with mock.patch.object(httpx.Response, "iter_raw", cut):
        assert invoke(saved.url, *words).exit_code == 130
    assert not directory(tmp_path, saved.a).exists()
    with mock.patch.object(httpx.Response, "iter_raw", seen):
        print_of(saved.url, *words)
    assert asked == [f"bytes={begun}-"]
    assert [*tmp_path.iterdir()] == [directory(tmp_path, saved.a)], "no partial download is left"


def test_download_with_wrong_hash_is_refused(saved: Saved, tmp_path: Path) -> None:
    honest = Target.details

    def lying(self: Target, path: str) -> CheckpointDetailsResponse | None:
        details = honest(self, path)
        assert details is not None
        files = [each.model_copy(update={"blake3": "0" * 64}) for each in details.files]
        return details.model_copy(update={"files": files})

    read_json(saved.url, "checkpoint", "download", saved.b, "-o", tmp_path)
    with mock.patch.object(Target, "details", lying):
        code, text = failure(saved.url, "checkpoint", "download", saved.a, "-o", tmp_path)
        assert code == 1 and "hash" in text
        again = ("checkpoint", "download", saved.b, "-o", tmp_path, "--force")
        assert failure(saved.url, *again)[0] == 1
    (kept,) = tmp_path.iterdir()
    assert kept == directory(tmp_path, saved.b), "a download appears only when it is complete"
    assert load_file(kept / "adapter_model.safetensors"), "an existing download stays until then"


def test_verify_without_hashes_downloads_and_reads_every_tensor(
    saved: Saved,
) -> None:
    with mock.patch.object(Target, "everstep", None):
        report = read_json(saved.url, "checkpoint", "verify", saved.a)
        assert report["ok"]
        assert "adapter_model.safetensors" in [e["name"] for e in report["results"][0]["files"]]
        damaged = Refused("not a whole safetensors file")
        with mock.patch.object(tensor_diff, "read", side_effect=damaged):
            done = invoke(saved.url, "checkpoint", "verify", saved.a)
        assert done.exit_code == 1 and "not a whole" in done.stdout
        made = read_json(saved.url, "checkpoint", "save-as", saved.b, "again")["tinker_path"]
    assert read_json(saved.url, "checkpoint", "diff", saved.b, made)["same"]
    listed = read_json(saved.url, "checkpoint", "info", made)
    assert listed["user_metadata"] == {"loss": "0.5"} and listed["details"]["step"] == 2


def test_diff_reports_differences_by_tensor(saved: Saved, tmp_path: Path) -> None:
    done = invoke(saved.url, "checkpoint", "diff", saved.a, saved.b, "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["a"]["facts"]["step"], report["b"]["facts"]["step"]) == ("1", "2")
    assert not report["same"] and 0 < report["all"]["relative"] < 1
    assert report["all"]["cosine"] < 1
    assert {each["status"] for each in report["tensors"]} == {"changed"}
    read_json(saved.url, "checkpoint", "download", saved.a, saved.b, "-o", tmp_path)
    local = [directory(tmp_path, each) for each in (saved.a, saved.b)]
    offline = invoke("http://127.0.0.1:1", "checkpoint", "diff", *local, "--json")
    assert json.loads(offline.stdout)["tensors"] == report["tensors"]
    text = invoke(saved.url, "checkpoint", "diff", saved.a, local[1], "--limit", 3).stdout
    assert saved.a in text and "3 are shown" in text and "lora_B" in text


def test_facts_fit_a_narrow_terminal(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    facts = {"step": "1", "note": "x" * 40}
    a = diff.Side("a", Path("a"), facts, [])
    b = diff.Side("b", Path("b"), {**facts, "step": "2"}, [])
    diff._print_facts(a, b)
    wide = diff.Side("b", Path("b"), {**facts, "note": "y" * 40}, [])
    diff._print_facts(a, wide)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert all(len(line) <= 60 for line in lines), lines
    assert [line.split() for line in lines[-2:]] == [
        ["≠", "A", "note", "x" * 40],
        ["≠", "B", "note", "y" * 40],
    ]


def test_diff_reports_equal_adapters(saved: Saved) -> None:
    text = print_of(saved.url, "checkpoint", "diff", saved.b, saved.sampler)
    assert "are equal, bit for bit" in text
    assert read_json(saved.url, "checkpoint", "diff", saved.b, saved.b)["same"] is True


def test_diff_shows_the_lineage(saved: Saved) -> None:
    copy = read_json(saved.url, "checkpoint", "save-as", saved.a, "copy")["tinker_path"]
    report = read_json(saved.url, "checkpoint", "diff", saved.a, copy)
    assert report["same"] and report["lineage"] == "B descends from A"


def test_diff_refuses_missing_or_damaged_files(saved: Saved, tmp_path: Path) -> None:
    assert failure(saved.url, "checkpoint", "diff", saved.a, tmp_path / "none")[0] == 3
    code, text = failure(saved.url, "checkpoint", "diff", saved.a, tmp_path)
    assert code == 3 and "adapter_model.safetensors" in text
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    code, text = failure(saved.url, "checkpoint", "diff", tmp_path, saved.a)
    assert code == 1 and "safetensors" in text


def test_doctor_reports_sound_setup_as_ok(service: Service) -> None:
    done = invoke(service.url, "doctor", "--home", service.home, "--json")
    report = json.loads(done.stdout)
    states = {each["name"]: each["state"] for each in report["checks"]}
    assert done.exit_code == 0 and report["ok"], report
    assert {"Python", "torch", "home", "disk", "ledger", "vault", "service"} <= states.keys()
    assert {"API key", "clock", "releases", "models", "tokenizer"} <= states.keys()
    assert MODEL in print_of(service.url, "doctor", "--home", service.home)


def test_doctor_reports_unreachable_service_with_advice(tmp_path: Path) -> None:
    done = invoke("http://127.0.0.1:1", "doctor", "--home", tmp_path / "home", "--json")
    checks = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    assert done.exit_code == 1
    assert checks["service"]["state"] == "problem"
    assert "everstep serve" in checks["service"]["advice"]
    assert checks["home"]["state"] == "ok" and not (tmp_path / "home").exists()


def test_doctor_finds_damage_in_home(tmp_path: Path) -> None:
    (tmp_path / "vault" / "manifests" / "training" / "run").mkdir(parents=True)
    (tmp_path / "vault" / "manifests" / "training" / "run" / "x.json").write_text("no manifest")
    found = {each.name: each for each in home.check_home(tmp_path)}
    assert found["ledger"].state == found["vault"].state == "problem"
    assert "restore" in found["ledger"].found and "--quarantine" in str(found["vault"].advice)


@pytest.mark.parametrize(
    ("status", "date", "health", "clock"),
    [
        (200, "Wed, 25 Nov 2020 10:00:00 GMT", "ok", "warning"),
        (503, None, "warning", "ok"),
        (401, None, "problem", "ok"),
        (404, None, "warning", "ok"),
    ],
)
def test_doctor_reads_health_and_clock_from_responses(
    status: int, date: str | None, health: str, clock: str
) -> None:
    answer = httpx.Response(status, headers={} if date is None else {"Date": date})
    assert doctor_service._health("http://x", answer).state == health
    assert doctor_service._clock(answer).state == clock


def test_doctor_checks_api_key_and_other_services(tmp_path: Path) -> None:
    hub = mock.patch("transformers.AutoTokenizer.from_pretrained", side_effect=OSError("no hub"))
    with KeepingService() as other, hub:
        found = [*doctor_service.check_service(other.url, KEY, tmp_path)]
        states: dict[str, Any] = {each.name: each for each in found}
        assert states["releases"].found.endswith("the service is not Everstep")
        assert states["models"].state == "ok"
        assert states["tokenizer"].state == "problem" and "HF_HOME" in states["tokenizer"].advice
        found = [*doctor_service.check_service(other.url, "sk-1", tmp_path)]
    assert (found[0].name, found[0].state) == ("API key", "problem")
    assert "tml-" in found[0].found


@pytest.mark.parametrize("address", ["127.0.0.1:8055", "http://[bad", "ftp://host"])
def test_doctor_reports_malformed_address(address: str, tmp_path: Path) -> None:
    (found,) = doctor_service.check_service(address, KEY, tmp_path)
    assert (found.name, found.state) == ("service", "problem")
    assert address in found.found and "http://HOST:PORT" in found.found


@pytest.mark.parametrize(("status", "advice"), [(401, "key"), (404, "address"), (500, "log")])
def test_doctor_advises_when_models_can_not_be_listed(status: int, advice: str) -> None:
    assert advice in str(doctor_service._no_models(httpx.Response(status, text="no")).advice)


def test_download_is_refused_when_service_offers_none(
    tmp_path: Path,
) -> None:
    with KeepingService() as other:
        with connect(everstep, other.url) as client:
            run = client.create_lora_training_client("fake/model", 4, 1).result()
            path = run.save_state("x").result().path
        code, text = failure(other.url, "checkpoint", "download", path, "-o", tmp_path)
    assert code != 0 and text.startswith("everstep: ")


def test_download_has_the_sizes_of_the_vault(
    saved: Saved, service: Service, tmp_path: Path
) -> None:
    read_json(saved.url, "checkpoint", "download", saved.a, "-o", tmp_path)
    files = read_json(saved.url, "checkpoint", "info", saved.a)["details"]["files"]
    sizes = {each["name"]: each["size_bytes"] for each in files}
    here = directory(tmp_path, saved.a)
    assert {name: (here / name).stat().st_size for name in sizes} == sizes
    assert hashes(service.home, saved.a)
