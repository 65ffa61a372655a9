"""One answer on the wire: what is sent, and that the answers are ended however the connection ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pocketlm.errors import PromptError
from pocketlm.server.event_stream import EventStream, LineStream, event, json_bytes, line

Message = dict[str, Any]


class Answers:
    closed = 0

    async def close(self) -> None:
        self.closed += 1


class Client:
    """The other side of an ASGI connection."""

    def __init__(self, *, takes: int | None = None) -> None:
        """After `takes` messages it reads no more, but stays."""
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self._takes = takes

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._takes is not None and len(self.sent) >= self._takes:
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def call(
    client: Client,
    chunks: AsyncIterator[bytes],
    kind: Callable[..., EventStream] = EventStream,
    path: str = "/v1/chat/completions",
    **options: Any,
) -> Answers:
    answers = Answers()
    response = kind(answers, chunks, send_timeout_s=options.pop("send_timeout_s", 5.0), **options)
    await response({"type": "http", "path": path}, client.receive, client.send)
    return answers


async def two() -> AsyncIterator[bytes]:
    yield event({"n": 1})
    yield event({"n": 2}, "second")


def test_events_come_as_they_are() -> None:
    async def run() -> None:
        client = Client()
        answers = await call(client, two())
        assert client.body == b'data: {"n":1}\n\nevent: second\ndata: {"n":2}\n\n'
        assert client.sent[0]["status"] == 200
        headers = dict(client.sent[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in headers
        assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert answers.closed == 1

    asyncio.run(run())


def test_a_client_that_goes_away_ends_the_answers() -> None:
    async def run() -> None:
        client = Client()

        async def endless() -> AsyncIterator[bytes]:
            yield b"a"
            client.gone.set()
            await asyncio.Event().wait()

        answers = await call(client, endless())
        assert (client.body, answers.closed) == (b"a", 1)
        assert client.sent[-1]["more_body"]

    asyncio.run(run())


def test_a_client_that_reads_nothing_is_given_up() -> None:
    async def run() -> None:
        client = Client(takes=1)
        answers = await call(client, two(), send_timeout_s=0.05)
        assert (client.body, answers.closed) == (b"", 1)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("/v1/completions", EventStream, b'data: {"error":{"message":"No."'),
        ("/v1/messages", EventStream, b'data: {"type":"error","error":{"message":"No."'),
        ("/api/chat", LineStream, b'{"error":"No."}\n'),
    ],
)
def test_an_error_under_way_is_the_last_event(
    path: str, kind: Callable[..., EventStream], expected: bytes
) -> None:
    async def fails() -> AsyncIterator[bytes]:
        yield b"begun "
        raise PromptError("no.")

    async def run() -> None:
        client = Client()
        failed = None if kind is EventStream else lambda error: line({"error": error.message})
        answers = await call(client, fails(), kind, path, failed=failed)
        assert client.body.startswith(b"begun " + expected)
        assert not client.sent[-1]["more_body"]
        assert answers.closed == 1

    asyncio.run(run())


@pytest.mark.parametrize(("kind", "pinged"), [(EventStream, True), (LineStream, False)])
def test_silence_is_broken_by_a_comment(kind: Callable[..., EventStream], pinged: bool) -> None:
    async def run() -> None:
        client = Client()
        may_go_on = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            await may_go_on.wait()
            yield b"at last"

        async def wait_for_ping() -> None:
            while pinged and b": ping\n\n" not in client.body:
                await asyncio.sleep(0.005)
            may_go_on.set()

        waiting = asyncio.create_task(wait_for_ping())
        await call(client, slow(), kind, ping_s=0.01)
        await waiting
        assert client.body.endswith(b"at last")
        assert (b": ping\n\n" in client.body) is pinged

    asyncio.run(run())


def test_an_answer_whose_task_is_cancelled_is_ended() -> None:
    async def run() -> None:
        client, closed = Client(), []

        class Closes(Answers):
            async def close(self) -> None:
                closed.append(True)

        async def endless() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        response = EventStream(Closes(), endless(), send_timeout_s=5.0)
        task = asyncio.create_task(response({"type": "http", "path": "/"}, client.receive, client.send))
        while not client.sent:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [True]

    asyncio.run(run())


def test_half_a_surrogate_pair_is_a_question_mark() -> None:
    assert json_bytes({"text": json.loads('"\\ud83d"')}) == b'{"text":"?"}'
    assert json_bytes("é😀") == '"é😀"'.encode()
