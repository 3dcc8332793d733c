"""The process that computes jobs: ``python -m everstep.server.offload.process SOCKET``.

It ends when the service closes its end of the socket, or dies.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback

from everstep.server.offload.jobs import JOBS
from everstep.spool import read_all, write_all

MESSAGE_BYTES = 1 << 20


def serve(connection: socket.socket) -> None:
    """Compute one job after the other.

    A request is a line of JSON, with the descriptors of the body's spool and the result's. So is a
    reply, without descriptors.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
        if not message:
            return
        while not message.endswith(b"\n"):
            message += connection.recv(MESSAGE_BYTES)
        source, target = descriptors
        request = json.loads(message)
        try:
            body = read_all(source, request["size"])
            facts, result = JOBS[request["job"]](request["arguments"], body)
            write_all(target, result)
            reply = {"facts": facts, "size": len(result)}
        except Exception as error:  # noqa: BLE001  the service logs it and goes on
            reply = {"failed": "".join(traceback.format_exception(error))}
        os.close(source)
        os.close(target)
        connection.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
