"""What all APIs share: answers begin, are merged, counted and ended, and the model is given back."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from helpers.serving import PATIENCE_S, Running, running, tiny_store
from pocketlm.aio import AsyncModel
from pocketlm.energy import CpuEstimate, process_cpu_seconds
from pocketlm.energy.sharing import SharedMeter
from pocketlm.errors import InvalidSettingError
from pocketlm.server.answers import ClientGoneError, Service, finished
from pocketlm.server.config import ServerConfig
from pocketlm.server.errors import ApiError
from pocketlm.server.metrics import Metrics
from pocketlm.server.model_store import UnknownModelError
from pocketlm.session import Session


@asynccontextmanager
async def service_on(bundle: Path, **config: Any) -> AsyncIterator[Service]:
    store = tiny_store({"tiny": bundle})
    meter = SharedMeter(CpuEstimate(process_cpu_seconds()), lambda: store.busy_s)
    service = Service(ServerConfig(**config), store, meter, Metrics(store))
    service.state = "ready"
    yield service
    await store.close()
    meter.close()


async def idle(service: Service) -> None:
    """Waits until nothing is under way and no use of a model is left."""
    async with asyncio.timeout(PATIENCE_S):
        while any(state.running or state.waiting for state in service.store.states()):
            await asyncio.sleep(0.002)


def test_answers_are_merged_and_counted(int8_bundle: Path) -> None:
    async def run() -> None:
        async with service_on(int8_bundle) as service:
            answers = await service.ask(
                "chat", "tiny", "Hello", n=3, max_tokens=5, ignore_eos=True, temperature=1.0, seed=1
            )
            texts = {0: "", 1: "", 2: ""}
            async for index, piece in answers:
                texts[index] += piece.text
            result = answers.result
            await answers.close()
            assert [each.text for each in result.completions] == list(texts.values())
            assert all(each.usage.completion_tokens == 5 for each in result.completions)
            assert result.reading.energy_j is not None
            assert result.reading.kind == "estimated"
            assert answers.result is result
            await idle(service)

    asyncio.run(run())


@pytest.mark.parametrize("n", [1, 2])
def test_answers_that_nobody_reads_are_ended(int8_bundle: Path, n: int) -> None:
    async def run() -> None:
        async with service_on(int8_bundle) as service:
            unread = await service.ask("chat", None, "Hello", n=n, ignore_eos=True)
            await unread.close()
            begun = await service.ask("chat", None, "Hello", n=n, ignore_eos=True)
            async for _ in begun:
                break
            await begun.close()
            await begun.close()
            await idle(service)
            assert all(each.finish_reason == "cancelled" for each in begun.result.completions)

    asyncio.run(run())


@pytest.mark.parametrize(("streamed", "counted"), [(True, {"500": 1.0}), (False, {})])
def test_a_defect_of_the_engine_is_no_client_that_went_away(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, counted: dict[str, float]
) -> None:
    """What is not streamed becomes an error's answer, and whoever gives that counts it."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    async def run() -> None:
        async with service_on(int8_bundle) as service:
            monkeypatch.setattr(Session, "forward", fails)
            answers = await service.ask("chat", None, "Hello", n=2)
            with pytest.raises(RuntimeError, match="a defect"):
                if streamed:
                    async for _ in answers:
                        raise AssertionError
                else:
                    await answers.finish()
            await answers.close()
            await idle(service)
            content, _ = service.metrics.render()
            assert statuses(content.decode()) == counted

    asyncio.run(run())


def statuses(metrics: str) -> dict[str, float]:
    """How many requests there were by their status."""
    return {
        sample.labels["status"]: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "pocketlm_requests_total"
    }


def test_a_client_that_goes_away_frees_its_slot(int8_bundle: Path) -> None:
    async def run() -> None:
        async with service_on(int8_bundle) as service:
            answers = await service.ask("chat", "tiny", "Hello", ignore_eos=True)

            async def receive() -> dict[str, Any]:
                return {"type": "http.disconnect"}

            with pytest.raises(ClientGoneError):
                await finished(Request({"type": "http"}, receive), answers)
            await idle(service)

    asyncio.run(run())


def test_a_client_that_goes_away_does_not_wait_for_its_model(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    requests: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": messages, "stream": True},
        "/v1/completions": {"prompt": ["Hi", "Ho"]},
        "/v1/responses": {"input": "Hi"},
        "/v1/messages": {"messages": messages, "max_tokens": 5},
        "/api/chat": {"messages": messages},
        "/api/generate": {"prompt": "Hi"},
    }

    async def never(*_: Any, **__: Any) -> AsyncModel:
        await asyncio.Event().wait()
        raise AssertionError

    def wait_for(server: Running, waiting: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while server.service.store.states()[0].waiting != waiting:
            assert time.monotonic() < deadline, f"{waiting} requests should wait"
            time.sleep(0.002)

    monkeypatch.setattr(AsyncModel, "load", never)
    with running({"tiny": int8_bundle}) as server:
        port = int(server.url.rpartition(":")[2])
        for path, fields in requests.items():
            body = json.dumps({"model": "tiny", **fields})
            with socket.create_connection(("127.0.0.1", port)) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(f"{head}{body}".encode())
                wait_for(server, 1)
            wait_for(server, 0)


def test_limits_of_the_server(int8_bundle: Path) -> None:
    async def run() -> None:
        async with service_on(int8_bundle, max_answers=2, max_tokens=4) as service:
            with pytest.raises(ApiError, match=r"n is 3; this server gives 2"):
                await service.ask("chat", "tiny", "Hello", n=3)
            with pytest.raises(ApiError, match="max_tokens is 5; this server gives 4"):
                await service.ask("chat", "tiny", "Hello", max_tokens=5)
            answers = await service.ask("chat", "tiny", "Hello", ignore_eos=True)
            result = await answers.finish()
            await answers.close()
            assert result.completions[0].usage.completion_tokens == 4

    asyncio.run(run())


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_there_are_no_answers_before_and_after(int8_bundle: Path, state: Any) -> None:
    async def run() -> None:
        async with service_on(int8_bundle) as service:
            service.state = state
            with pytest.raises(ApiError) as refusal:
                await service.ask("chat", "tiny", "Hello")
            assert (refusal.value.status, refusal.value.code) == (503, state)
            assert "Retry-After" in refusal.value.headers

    asyncio.run(run())


def test_what_is_refused_keeps_no_model(int8_bundle: Path) -> None:
    async def run() -> None:
        async with service_on(int8_bundle) as service:
            with pytest.raises(UnknownModelError):
                await service.ask("chat", "tinny", "Hello")
            with pytest.raises(InvalidSettingError):
                await service.ask("chat", "tiny", "Hello", temperature=-1.0)
            await service.store.unload("tiny")
            assert not service.store.states()[0].loaded

    asyncio.run(run())


def test_prompts_are_logged_only_where_it_is_asked_for(
    int8_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run(log_prompts: bool) -> None:
        async with service_on(int8_bundle, log_prompts=log_prompts) as service:
            answers = await service.ask("chat", "tiny", "A private matter", max_tokens=1)
            await answers.finish()
            await answers.close()

    with caplog.at_level("DEBUG"):
        asyncio.run(run(False))
        assert "private" not in caplog.text
        asyncio.run(run(True))
        assert "A private matter" in caplog.text


def test_embedding_has_the_time_that_answers_have(int8_bundle: Path) -> None:
    async def run() -> None:
        async with service_on(int8_bundle, answer_timeout_s=1e-9) as service:
            with pytest.raises(ApiError, match="longer than the 1e-09 s of --answer-timeout") as refusal:
                await service.embed("embeddings", "tiny", ["Hello"])
            assert (refusal.value.status, refusal.value.code) == (503, "timeout")
            await service.store.unload("tiny")
            assert not service.store.states()[0].loaded

    asyncio.run(run())
