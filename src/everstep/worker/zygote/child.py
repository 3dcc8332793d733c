"""The forked child: takes on its service's environment and runs the worker."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from typing import NoReturn

from everstep import failpoints
from everstep.worker import main
from everstep.worker.zygote.linux import set_title
from everstep.worker.zygote.requests import Descriptors, Request


def run(request: Request, descriptors: Descriptors) -> NoReturn:
    """Run a worker in this process, as ``python -m everstep.worker.main`` would. Never returns."""
    code = 1
    try:
        _prepare(request, descriptors)
        main.serve(descriptors.channel, descriptors.page, request.arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  as at the end of any process: a traceback and exit code 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare(request: Request, descriptors: Descriptors) -> None:
    os.setsid()
    set_title("everstep-worker", [*_COMMAND, json.dumps(request.arguments)])
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, descriptors.stdout), (2, descriptors.stderr)):
        os.dup2(source, target)
    for descriptor in (null, descriptors.stdout, descriptors.stderr, descriptors.status):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request.environment)
    os.umask(request.umask)
    os.chdir(request.directory)
    # Modules have read these when the zygote imported them.
    time.tzset()
    tempfile.tempdir = None
    failpoints.rearm()
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]


_COMMAND = (sys.executable, "-P", "-m", "everstep.worker.main")
