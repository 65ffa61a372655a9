"""The chat page in a real headless Chromium, and what a person would do there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.fake_chat_server import FakeChatServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, LocatorAssertions, Page, Request

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
TIMEOUT_MS = 20_000  # a busy machine is slow, not broken
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}

# The policy's violations as console errors, where they are found with the others.
_REPORT_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) =>
  console.error("violation of " + event.violatedDirective + ": " + event.blockedURI));
"""
_FORGET = """async () => {
  localStorage.clear();
  sessionStorage.clear();
  await new Promise((resolve) => { indexedDB.deleteDatabase("pocketlm").onsuccess = resolve; });
}"""
_REFUSED = re.compile(r"Failed to load resource: (the server responded with a status of [45]|net::ERR_)")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser. Skips where there is none, but not in CI: there it has to be."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        _miss("playwright is not installed")
    if path is None:
        _miss("there is no Chromium on this machine")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def expect(locator: Locator) -> LocatorAssertions:
    """Playwright's, which waits until what is expected is so."""
    from playwright.sync_api import expect

    return expect(locator)


def _miss(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and in CI the chat page has to be tested")
    pytest.skip(reason)


class ChatPage:
    """One tab."""

    def __init__(self, page: Page, fake: FakeChatServer) -> None:
        self.page = page
        self.fake = fake
        self.problems: list[str] = []
        self.stale = True  # what is stored is not what a test may expect
        page.set_default_timeout(TIMEOUT_MS)
        page.add_init_script(_REPORT_VIOLATIONS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", self._on_request)

    def open(self, fragment: str = "") -> None:
        """Until the models are known."""
        self.page.goto(f"{self.fake.url}{fragment}")
        self.page.locator("#model:enabled").wait_for()

    def reset(self) -> None:
        """As if nobody had been here: quicker than a new tab."""
        if self.page.url.startswith(self.fake.url):
            self.page.evaluate(_FORGET)
        self.page.emulate_media(color_scheme="light")
        self.problems.clear()
        self.open()
        self.stale = False

    def begin(self) -> None:
        """A new conversation; what is stored stays. Quicker still."""
        if self.stale:
            self.reset()
            return
        self.problems.clear()
        self.page.keyboard.press("Control+Shift+O")
        self.page.locator("#empty").wait_for()

    def reload(self) -> None:
        self.page.reload()
        self.page.locator("#model:enabled").wait_for()

    def type_and_send(self, text: str) -> None:
        self.prompt.fill(text)
        self.page.locator("#send").click()

    def ask(self, text: str) -> None:
        """Sends and waits for the end of the answer."""
        self.type_and_send(text)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        self.page.locator("#send").wait_for(state="visible")

    @property
    def prompt(self) -> Locator:
        return self.page.locator("#prompt")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".message.answer .markdown")

    @property
    def bubbles(self) -> Locator:
        return self.page.locator(".bubble")

    @property
    def titles(self) -> list[str]:
        return self.page.locator("#conversations .open-link").all_inner_texts()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def menu(self, title: str, entry: str) -> None:
        """An entry of a conversation's menu."""
        self.page.get_by_role("listitem").filter(has_text=title).hover()
        self.button(f"More for {title}").click()
        self.page.locator("#conversation-menu").get_by_role("button", name=entry).click()

    def download(self, action: Any) -> tuple[str, str]:
        """Name and text of the file that `action` offers."""
        with self.page.expect_download() as waiting:
            action()
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_text(encoding="utf-8")

    def _on_console(self, message: ConsoleMessage) -> None:
        # Chromium itself reports each refused request; the tests refuse on purpose.
        if message.type in ("error", "warning") and not _REFUSED.match(message.text):
            self.problems.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.fake.url, "blob:")):
            self.problems.append(f"request to {request.url}")


@contextmanager
def chat_page(
    browser: Browser, fake: FakeChatServer, *, script: str | None = None, opened: bool = True, **options: Any
) -> Iterator[ChatPage]:
    """A tab with storage of its own. Fails in the end if there was an error, a violation of the policy or a
    request to another server. `script` runs before the page's."""
    options.setdefault("reduced_motion", "reduce")
    options.setdefault("permissions", ["clipboard-read", "clipboard-write"])
    context = browser.new_context(**options)
    try:
        chat = ChatPage(context.new_page(), fake)
        if script is not None:
            chat.page.add_init_script(script)
        if opened:
            chat.open()
        yield chat
        assert chat.problems == []
    finally:
        context.close()
