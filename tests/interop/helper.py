"""Helper process: imports a release of the official SDK once, then forks for each program.

    python helper.py MODULE...

It imports the modules, then reads orders from standard input, one JSON object a line:
`{"target": "module:function", "arguments": {...}, "environment": {...}, "argv": [...]}`. A forked
child calls the function and prints the JSON of what it returns. The answer is a line of JSON with
the child's exit code and what it wrote to standard output and standard error.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from typing import Any, BinaryIO


def main(modules: list[str]) -> None:
    """Serve orders until standard input ends."""
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # pages that children share stay shared
    for line in sys.stdin.buffer:
        with tempfile.TemporaryFile() as output:
            pid = os.fork()
            if pid == 0:
                run(json.loads(line), output)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            output.seek(0)
            text = output.read().decode(errors="replace")
        print(json.dumps({"code": code, "output": text}), flush=True)


def run(order: dict[str, Any], output: BinaryIO) -> None:
    """Execute an order in a child, and end the child."""
    code: int | str | None = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.update(order["environment"])
        sys.argv = order["argv"]
        module, _, function = order["target"].partition(":")
        result = getattr(importlib.import_module(module), function)(**order["arguments"])
        print(json.dumps(result))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  the exit code and the output report it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main(sys.argv[1:])
