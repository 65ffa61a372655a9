"""Requests made from the application's own description of itself: it answers right and wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import APIOperation, Case, GenerationMode

from helpers.serving import Running, running
from pocketlm.server.config import ServerConfig

EXAMPLES = 3  # of each operation, right ones, and as many wrong ones


@pytest.fixture(scope="module")
def small_server(int8_bundle: Path) -> Iterator[Running]:
    """Its answers are short, as few requests say how long they are to be."""
    with running({"tiny": int8_bundle}, ServerConfig(port=0), context_length=64) as server:
        yield server


@pytest.fixture(scope="module")
def operations(small_server: Running) -> list[APIOperation]:
    schema = schemathesis.openapi.from_dict(small_server.app.openapi())
    return [result.ok() for result in schema.get_all_operations()]


def test_right_requests_are_answered(small_server: Running, operations: list[APIOperation]) -> None:
    with small_server.client() as client:
        statuses = {each.label: statuses_of(client, each, GenerationMode.POSITIVE) for each in operations}
    # Not each time everywhere: a description cannot tell what a grammar is, or which roles a template knows.
    assert sum(200 in some for some in statuses.values()) > len(statuses) / 3


def test_wrong_requests_are_refused(small_server: Running, operations: list[APIOperation]) -> None:
    fallible = [
        each for each in operations if each.body
    ]  # nothing can be wrong with a request without fields
    with small_server.client() as client:
        statuses = {each.label: statuses_of(client, each, GenerationMode.NEGATIVE) for each in fallible}
    for label, some in statuses.items():
        assert max(some) >= 400, label


def statuses_of(client: httpx.Client, operation: APIOperation, mode: GenerationMode) -> set[int]:
    """What the server says to some requests for an operation. None of it may be a failure of its own."""
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,  # the same requests each time
        phases=[Phase.generate],  # no shrinking, which would take long: a request is small as it is
        suppress_health_check=list(HealthCheck),  # what they watch is schemathesis' doing
    )
    @given(operation.as_strategy(mode))
    def one(case: Case) -> None:
        response = send(client, case)
        statuses.add(response.status_code)
        assert response.status_code < 500, (case.body, response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert (error if isinstance(error, str) else error["message"]).strip()

    one()
    return statuses


def send(client: httpx.Client, case: Case) -> httpx.Response:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # another name would be all that the server looks at
    request = case.as_transport_kwargs(base_url=str(client.base_url))
    return client.request(
        request["method"],
        request["url"],
        params=request.get("params"),
        json=request.get("json"),
        content=request.get("data"),
        headers=dict(request.get("headers") or {}),
    )
