"""One server for the tests of all APIs: `tiny`, and `tiny-tools`, whose template shows tools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx

    from helpers.serving import Running


@pytest.fixture(scope="session")
def tools_bundle(int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that shows tools, as Qwen and Hermes have them."""
    from helpers.tiny import bundle_with_tools

    return bundle_with_tools(int8_bundle, tmp_path_factory.mktemp("tools") / "bundle", "tiny-tools")


@pytest.fixture(scope="session")
def server(int8_bundle: Path, tools_bundle: Path) -> Iterator[Running]:
    from helpers.serving import running

    with running({"tiny": int8_bundle, "tiny-tools": tools_bundle}) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
