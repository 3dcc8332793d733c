"""Generated code: the committed protobuf module equals the output of `make proto`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import everstep.wire.codecs

CODECS = Path(everstep.wire.codecs.__file__).parent


def test_generated_code_matches_the_proto_file(tmp_path: Path) -> None:
    source = CODECS.parents[2]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}"]
    command += [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, "everstep/wire/codecs/everstep.proto"], check=True, cwd=source)
    for name in ("everstep_pb2.py", "everstep_pb2.pyi"):
        assert (tmp_path / "everstep/wire/codecs" / name).read_text() == (CODECS / name).read_text()
