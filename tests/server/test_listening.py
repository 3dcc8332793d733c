"""The listening socket: its connections don't delay responses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
import uvloop

from everstep.server.serve import listen


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_connections_do_not_wait_to_fill_a_packet(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def accepted_option() -> int:
        option: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            option.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            result = await option
            writer.close()
            await writer.wait_closed()
        return result

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(accepted_option())
