"""uvicorn's HTTP/1.1, with the limits that it lacks: of connections, of the time that a client may take to
say what it wants, and of the time that it may not read what it is told."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from pocketlm.server.config import ServerConfig

IDLE_SHARE = 2
"""Connections, in requests that may be under way: clients keep some open for their next request."""

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


class HttpProtocol(H11Protocol):
    """One connection. Between two requests uvicorn's keep-alive timer runs, during an answer none: before its
    first request and from the first byte of each head on, this one's does."""

    most_connections: int
    head_timeout_s: float
    send_timeout_s: float
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.write(_FULL)
            transport.close()
            return
        # Or a small answer's body waits 40 ms for the other side to acknowledge its head (Nagle's algorithm);
        # asyncio does it for sockets that name their protocol, which those of `socket.create_server` do not.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Each byte that the kernel does not take at once counts as unread, so the timer sees them all.
        transport.set_write_buffer_limits(high=0)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(math.inf)

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None and self.timeout_keep_alive_task is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _watch_reader(self, unread_before: float) -> None:
        """Gives the client up if it has taken nothing since there were so many bytes for it. A large answer
        over a slow line may take longer."""
        unread = self.transport.get_write_buffer_size()
        if unread < unread_before:
            self._send_timer = self.loop.call_later(self.send_timeout_s, self._watch_reader, unread)
        else:
            self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


def http_protocol(config: ServerConfig) -> type[HttpProtocol]:
    """The class for a server with these limits: uvicorn makes the instances."""

    class Limited(HttpProtocol):
        most_connections = IDLE_SHARE * config.max_connections
        head_timeout_s = config.body_timeout_s
        send_timeout_s = config.send_timeout_s

    return Limited
