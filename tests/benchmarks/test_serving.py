"""The server's benchmark: figures of real servers with a tiny model, and what it makes of bad ones."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from helpers.processes import ROOT
from pocketlm_benchmarks.engines.protocol import EngineError
from pocketlm_benchmarks.serving import Cell, app, failures, table
from pocketlm_benchmarks.serving_client import Answered, Client
from pocketlm_benchmarks.serving_process import Served, listening_pid, served
from pocketlm_benchmarks.serving_soak import Sample, Soak


@pytest.fixture(scope="module")
def ours(int8_bundle: Path) -> Iterator[Served]:
    """`pocketlm serve` in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in ("models", "runtime")))
        with served("ours", str(int8_bundle), ["--threads", "1"]) as server:
            yield server


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that gives every client `answer`, and closes the connection."""
    ready: list[Any] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(one, "127.0.0.1", 0)
        stop = asyncio.Event()
        ready.extend([asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]])
        begun.release()
        await stop.wait()
        server.close()

    begun = Semaphore(0)
    thread = Thread(target=lambda: asyncio.run(run()))
    thread.start()
    begun.acquire()
    loop, stop, port = ready
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def test_load_of_two_servers(ours: Served) -> None:
    url = f"http://127.0.0.1:{ours.client.port}"
    assert listening_pid(ours.client.port) == ours.pid
    arguments = [url, "--against", url, "--clients", "1,3", "--max-tokens", "5"]
    result = invoke("load", *arguments, "--rounds", "2", "--requests", "2", "--json")
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)
    assert [(cell["server"], cell["clients"]) for cell in cells] == [
        ("pocketlm", 1),
        (url, 1),
        ("pocketlm", 3),
        (url, 3),
    ]
    for cell in cells:
        assert cell["answers"] == cell["clients"] * 2 * 2
        assert (cell["refused"], cell["failed"]) == (0, 0)
        assert 0 < cell["ttft_p50_s"] <= cell["ttft_p99_s"]
        assert 0 <= cell["token_p50_s"] <= cell["token_p99_s"]
        assert cell["tokens_per_s"] > 0
        assert cell["cpu_s_per_token"] >= 0
        assert cell["own_bytes"] > 1 << 20


def test_a_short_soak(ours: Served) -> None:
    result = invoke(
        *("soak", f"http://127.0.0.1:{ours.client.port}", "--minutes", "0.05", "--samples", "4"),
        *("--max-tokens", "4", "--bound-mb", "100000", "--bound-ttft-s", "60", "--json"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["errors"] == {}
    assert len(told["samples"]) == 4
    assert all(sample["own_bytes"] > 1 << 20 for sample in told["samples"])
    assert set(told["requests"]) >= {"stream", "bad request", "JSON schema", "conversation 1", "embeddings"}
    assert told["growth_mb_per_min"] is not None
    assert told["worst_p99_s"] > 0


def test_a_server_that_refuses_or_breaks_off() -> None:
    body = {"messages": []}
    for answer, status in (
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}", 503),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata: \r\n", 0),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n", 0),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\ndata: [DONE]\n\n", 200),
        (b"", 0),
    ):
        with answering(answer) as url:
            assert asyncio.run(Client(url).chat(body)) == Answered(status)
    with answering(b"HTTP/1.1 200 OK\r\n\r\nno JSON") as url:
        assert asyncio.run(Client(url).post("/chat/completions", body)) == (0, None)


def test_what_is_no_server(tmp_path: Path) -> None:
    for url in ("https://127.0.0.1:1", "http://"):
        with pytest.raises(EngineError):
            Client(url)
    result = invoke("load", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "did not start" in result.stderr


def test_a_soak_that_finds_nothing() -> None:
    """There is no server at all: every request goes wrong, and nothing is known of memory."""
    result = invoke("soak", "http://127.0.0.1:9", "--minutes", "0.01", "--samples", "4")
    assert result.exit_code == 1
    assert "No answer ever began." in result.stderr
    assert "Growth in the second half: unknown." in result.stdout


def test_figures() -> None:
    answers = [Answered(200, 5, 0.1, 0.01), Answered(200, 5, 0.3, 0.03), Answered(503), Answered(0)]
    cell = Cell("one", 4, answers, wall_s=2.0, cpu_s=0.5, own_bytes=3_000_000)
    assert cell.figures() == {
        "server": "one",
        "clients": 4,
        "ttft_p50_s": pytest.approx(0.2),
        "ttft_p99_s": pytest.approx(0.298),
        "token_p50_s": pytest.approx(0.02),
        "token_p99_s": pytest.approx(0.0298),
        "tokens_per_s": 5.0,
        "answers": 2,
        "refused": 1,
        "failed": 1,
        "cpu_s_per_token": pytest.approx(0.05),
        "own_bytes": 3_000_000,
    }
    row = table([cell, Cell("elsewhere", 1, cpu_s=None)]).splitlines()
    assert row[1].split() == [
        "one",
        "4",
        "200.0",
        "298.0",
        "20.0",
        "29.8",
        "5.0",
        "2",
        "1",
        "1",
        "50.0",
        "3.0",
    ]
    assert row[2].split() == ["elsewhere", "1", *"-----", "0", "0", "0", "-", "-"]


def test_what_is_out_of_bounds() -> None:
    def samples(step: int, p99_s: float | None = 0.1) -> list[Sample]:
        filling = [Sample(60.0 * n, 10**9 * n, 1, 0.1, p99_s) for n in range(4)]
        return filling + [Sample(60.0 * n, 4 * 10**9 + step * n, 1, 0.1, p99_s) for n in range(4, 9)]

    flat = Soak(samples(0))
    assert flat.growth_mb_per_min == pytest.approx(0, abs=1e-3)
    assert failures(flat, 1.0, 5.0) == []
    assert failures(flat, 1.0, 0.05) == ["p99 of the time to first token was 0.10 s; 0.05 s is the bound."]
    growing = Soak(samples(2_000_000))
    assert failures(growing, 1.0, 5.0) == ["Memory grew by 2.00 MB a minute; 1 is the bound."]
    growing.errors["stream: 500"] = 2
    assert failures(growing, 3.0, 5.0) == ["2 requests went wrong."]
    assert failures(Soak(), 1.0, 5.0) == ["No answer ever began."]
