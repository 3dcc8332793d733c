"""Loading by hub id, from a local copy of the hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from everstep.engine import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_id_loads_the_model_in_the_hubs_cache(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(directories["qwen3"], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    info = load_model("mine", "someone/tiny", device="cpu").info
    assert (info.name, info.source, info.tokenizer_id) == ("mine", "someone/tiny", "someone/tiny")
    local = load_model("m", str(directories["qwen3"]), device="cpu").info
    assert info.fingerprint == local.fingerprint
