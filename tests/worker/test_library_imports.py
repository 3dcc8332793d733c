"""What a worker imports: a service's first step waits for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNWANTED = (
    "torch._dynamo.convert_frame",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "pandas",
    "scipy",
    "sklearn",
)
LOAD_AND_TRAIN = """
import gc, pathlib, sys
from everstep.worker.zygote.process import import_worker
import_worker()
imported = set(sys.modules)
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
from everstep.engine import load_model
from everstep.engine.models.pico import write_pico
from tests.runtime.local import Local
directory = pathlib.Path(sys.argv[1])
write_pico(directory / "pico")
with Local(directory / "home", load_model("pico", str(directory / "pico"), device="cpu")) as local:
    local.train(local.new_run(), 0)
late = set(sys.modules) - imported
print([name for name in sys.argv[2:] if name in sys.modules])
print(sorted(name for name in late if name.partition(".")[0] in ("sympy", "transformers")))
"""
USE_COMPILER = """
import sys
from everstep.worker.zygote.libraries import Compiler, import_libraries
import_libraries()
import torch
from transformers import masking_utils
print(isinstance(torch._dynamo, Compiler), torch.distributed.is_available())
print(type(masking_utils.TransformGetItemToIndex()).__module__)
print(isinstance(torch._dynamo, Compiler), torch._dynamo.config.__name__)
torch.use_deterministic_algorithms(True)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
"""


def output_of(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_worker_loads_and_trains_without_compiler_and_distributed_tensors(tmp_path: Path) -> None:
    frozen, unwanted, late = output_of(LOAD_AND_TRAIN, str(tmp_path), *UNWANTED)
    assert frozen == "True True"
    assert unwanted == "[]"
    assert late == "[]", (
        "the zygote imports what the loading of a model needs, once for all workers"
    )


IMPORT_MODULE = """
import sys
from everstep.worker.zygote.libraries import import_libraries
import_libraries()
from torch._dynamo.utils import counters
import torch._dynamo
print(counters is torch._dynamo.utils.counters, torch._dynamo.utils.__spec__.origin is not None)
print(torch._dynamo.utils is sys.modules["torch._dynamo.utils"], hasattr(torch._dynamo, "optimize"))
"""


def test_compiler_is_there_for_whoever_imports_a_module_of_it() -> None:
    assert output_of(IMPORT_MODULE) == ["True True", "True True"]


def test_compiler_is_there_for_whoever_uses_it() -> None:
    before, mode, after, compiled = output_of(USE_COMPILER)
    assert before == "True True"
    assert mode == "torch._dynamo._trace_wrapped_higher_order_op"
    assert after == "False torch._dynamo.config"
    assert compiled == "[2.0, 2.0]"
