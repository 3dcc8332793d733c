"""The zygote's process: makes the imports of a worker, then forks one on every request."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from everstep.worker.zygote import requests
from everstep.worker.zygote.libraries import import_libraries, no_collections
from everstep.worker.zygote.linux import die_with_parent, has_cuda_driver, thread_count
from everstep.worker.zygote.owner import UNFIT

_REQUEST_SECONDS = 10.0


def main(argv: list[str]) -> None:
    """Serve until the owner is gone.

    Args:
        argv: the descriptor of the owner's control socket, that of a listening socket for other
            services (or -1), and the owner's process id. Further arguments only add length, so
            that a worker's title fits in their place.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C in the terminal is the service's to handle
    die_with_parent(int(argv[2]))
    import_worker()
    if thread_count() > 1 or has_cuda_driver():
        print("everstep: the zygote is not fit to fork; workers are spawned", file=sys.stderr)
        sys.exit(UNFIT)
    listener = None if argv[1] == "-1" else socket.socket(fileno=int(argv[1]))
    Zygote(socket.socket(fileno=int(argv[0])), listener).serve()


def import_worker() -> None:
    """Make the imports of every worker, and those of loading a model."""
    with no_collections():
        import_libraries()
        import everstep.worker.main  # noqa: F401


class Zygote:
    """Forks workers and reports how each ended.

    Args:
        control: the owner's socket. The zygote ends when it is closed.
        listener: where other services connect, if they may.
    """

    def __init__(self, control: socket.socket, listener: socket.socket | None) -> None:
        self._control = control
        self._listener = listener
        self._connections: set[socket.socket] = set()
        self._statuses: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wakeup_writer = socket.socketpair()

    def serve(self) -> None:
        """Handle requests until the owner is gone."""
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._reap)
        if self._listener is not None:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._add(self._control)
        while True:
            for key, _ in self._selector.select():
                handle: Callable[[], None] = key.data
                handle()

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        self._connections.add(connection)
        self._add(connection)

    def _add(self, control: socket.socket) -> None:
        control.settimeout(_REQUEST_SECONDS)
        try:
            control.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
        except OSError:
            self._drop(control)
            return
        self._selector.register(control, selectors.EVENT_READ, partial(self._handle, control))

    def _drop(self, control: socket.socket) -> None:
        if control is self._control:
            os._exit(0)  # the owner is gone
        self._connections.discard(control)
        control.close()

    def _handle(self, control: socket.socket) -> None:
        try:
            received = requests.receive(control)
        except (ValueError, OSError):
            received = None
        if received is None:
            self._selector.unregister(control)
            self._drop(control)
            return
        request, descriptors = received
        status = socket.socket(fileno=os.dup(descriptors.status))
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:
            status.send(json.dumps({"error": str(error)}).encode())
            status.close()
        else:
            if pid == 0:
                status.close()
                self._become_worker(request, descriptors)
            self._statuses[pid] = status
            self._report_start(status, pid)
        descriptors.close()

    def _report_start(self, status: socket.socket, pid: int) -> None:
        pidfd = os.pidfd_open(pid)  # the worker isn't reaped yet: this is the right process
        try:
            socket.send_fds(status, [json.dumps({"pid": pid}).encode()], [pidfd])
        except OSError:  # the service is gone; its worker sees that by itself
            pass
        finally:
            os.close(pidfd)

    def _reap(self) -> None:
        """Report the ends of all workers that have ended."""
        try:
            while self._wakeup.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._statuses:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._statuses.pop(pid) as status:
                code = os.waitstatus_to_exitcode(ended)
                with suppress(OSError):  # the service is gone
                    status.send(json.dumps({"code": code}).encode())

    def _become_worker(self, request: requests.Request, descriptors: requests.Descriptors) -> None:
        """In the child: let go of everything that is the zygote's, and run the worker."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        sockets = [self._control, self._wakeup, self._wakeup_writer]
        sockets += [*self._connections, *self._statuses.values()]
        for each in sockets:
            each.close()
        if self._listener is not None:
            self._listener.close()
        from everstep.worker.zygote.child import run

        run(request, descriptors)
