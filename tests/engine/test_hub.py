"""A model is named by a hub id, too; here the hub's cache stands for the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.engine import load_model

pytestmark = pytest.mark.slow
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
from everstep.engine import load_model
info = load_model("mine", "someone/tiny", device="cpu").info
print(info.name, info.source, info.tokenizer_id, info.fingerprint)
"""


def test_a_hub_id_loads_what_the_hub_has(directories: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(directories["qwen3"], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    fingerprint = load_model("m", str(directories["qwen3"]), device="cpu").info.fingerprint
    assert done.stdout.split() == ["mine", "someone/tiny", "someone/tiny", fingerprint]
