"""A browser and a scripted server for a module: while the browser is there, no test can run an event loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from helpers.chat_page import ChatPage, chat_page, chromium
from helpers.fake_chat_server import FakeChatServer, serving_chat

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server() -> Iterator[FakeChatServer]:
    with serving_chat() as fake:
        yield fake


@pytest.fixture
def fake(server: FakeChatServer) -> FakeChatServer:
    server.reset()
    return server


@pytest.fixture(scope="module")
def tab(browser: Browser, server: FakeChatServer) -> Iterator[ChatPage]:
    with chat_page(browser, server, opened=False) as tab:
        yield tab


@pytest.fixture
def chat(tab: ChatPage, fake: FakeChatServer) -> Iterator[ChatPage]:
    """A new conversation."""
    tab.begin()
    yield tab
    assert tab.problems == []
