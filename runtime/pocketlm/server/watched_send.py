"""A `send` that knows whether an answer has begun: until then another one can be given in its place."""

from __future__ import annotations

from starlette.types import Message, Send


class WatchedSend:
    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def __call__(self, message: Message) -> None:
        self.begun = True
        await self._send(message)
