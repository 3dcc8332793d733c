"""The protobuf code that is committed is what `make proto` makes of everstep.proto."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import everstep.wire

WIRE = Path(everstep.wire.__file__).parent


def test_the_generated_code_is_that_of_the_description(tmp_path: Path) -> None:
    source = WIRE.parent.parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}"]
    command += [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, "everstep/wire/everstep.proto"], check=True, cwd=source)
    for name in ("everstep_pb2.py", "everstep_pb2.pyi"):
        assert (tmp_path / "everstep" / "wire" / name).read_text() == (WIRE / name).read_text()
