"""Signals: their effect on a server that serves or is stopping."""

from __future__ import annotations

import asyncio
import signal

import uvicorn
from fastapi import FastAPI

from everstep.server.serve import Server


def server() -> Server:
    return Server(uvicorn.Config(FastAPI()), asyncio.Event())


def test_first_signal_closes_the_runtime_and_a_later_ctrl_c_does_not() -> None:
    for first in (signal.SIGINT, signal.SIGTERM):
        stopped = server()
        stopped.handle_exit(first, None)
        assert (stopped.should_exit, stopped.force_exit) == (True, False)
        stopped.handle_exit(signal.SIGINT, None)
        assert stopped.force_exit


def test_ctrl_c_after_the_end_of_standard_input_counts_as_the_first() -> None:
    stopped = server()
    stopped.should_exit = True  # as at the end of standard input
    stopped.handle_exit(signal.SIGINT, None)
    assert not stopped.force_exit
