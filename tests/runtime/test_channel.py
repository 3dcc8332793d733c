"""The pipe between service and worker tells its end, however it came."""

from __future__ import annotations

import socket

from everstep.runtime.channel import BlockingChannel, Message, pack


def test_messages_arrive_as_they_were_sent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = BlockingChannel(theirs)
        ours.sendall(pack(Message({"command": "pass", "id": 1}, b"\x00" * 100_000)))
        message = channel.receive()
        assert message is not None
        assert (message.header["id"], len(message.body)) == (1, 100_000)


def test_a_closed_pipe_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    ours.close()
    assert channel.receive() is None
    theirs.close()


def test_a_service_that_was_killed_with_a_reply_unread_is_the_end_too() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    channel.send({"event": "done"}, b"unread")
    ours.close()  # with unread bytes: the kernel resets the connection
    assert channel.receive() is None
    theirs.close()


def test_a_cut_message_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    ours.sendall(pack(Message({"id": 1}, b"body"))[:-1])
    ours.close()
    assert channel.receive() is None
    theirs.close()
