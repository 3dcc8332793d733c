"""The channel between service and worker: frames, and its end for whatever reason."""

from __future__ import annotations

import socket

from everstep.worker.protocol.channel import BlockingChannel, Envelope, pack
from everstep.worker.protocol.messages import Captured, PassDone, TrainingPass


def test_message_arrives_as_it_was_sent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = BlockingChannel(theirs)
        sent = TrainingPass("run-1", b"\x00" * 100_000)
        ours.sendall(pack(1, sent))
        assert channel.receive() == Envelope(1, sent)


def test_closed_socket_ends_the_channel() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    ours.close()
    assert channel.receive() is channel.receive() is None
    theirs.close()
    assert theirs.fileno() == -1, "the channel holds the socket open"


def test_service_killed_with_an_unread_reply_ends_the_channel() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    channel.send(1, PassDone(b"unread"))
    ours.close()  # with unread bytes: the kernel resets the connection
    assert channel.receive() is None
    theirs.close()


def test_truncated_message_ends_the_channel() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    ours.sendall(pack(1, TrainingPass("run-1", b"body"))[:-1])
    ours.close()
    assert channel.receive() is None
    theirs.close()


def test_truncated_header_ends_the_channel() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    ours.sendall(pack(1, Captured())[:5])
    ours.close()
    assert channel.receive() is None
    theirs.close()
