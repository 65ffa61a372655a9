"""Where things are on the chat page, wide and narrow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from helpers.chat_page import ChatPage, chat_page, expect
from helpers.fake_chat_server import FakeChatServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser


NARROW: dict[str, Any] = {"viewport": {"width": 390, "height": 844}}
LOOK = """() => {
  const box = (selector) => document.querySelector(selector).getBoundingClientRect();
  return [box(".answer").top - box(".bubble").bottom, box(".bubble").height];
}"""


@pytest.mark.parametrize("touch", [False, True])
@pytest.mark.parametrize("question", ["Hi", "a question of many words " * 12])
def test_on_a_narrow_screen_the_answer_is_close_to_its_question(
    browser: Browser, fake: FakeChatServer, touch: bool, question: str
) -> None:
    with chat_page(browser, fake, **NARROW, has_touch=touch, is_mobile=touch) as chat:
        chat.ask(question)
        gap_px, height_px = chat.page.evaluate(LOOK)
        assert 8 <= gap_px <= 20
        assert height_px >= 32  # the buttons beside it make the message no higher
        expect(chat.page.get_by_role("button", name="Edit the message")).to_be_in_viewport(ratio=1)


def test_a_models_name_loses_whole_parts_where_there_is_no_room(
    browser: Browser, fake: FakeChatServer
) -> None:
    name = "smollm2-135m"
    meta = {"precision": "int8", "bytes": 142_000_000, "context_length": 2048, "loaded": True}
    fake.models = [{"id": name, "meta": meta}]
    with chat_page(browser, fake) as chat:
        option = chat.page.locator("#model option")
        for width_px, text in (
            (1280, " · int8 · 142 MB"),
            (390, " · int8"),
            (310, ""),
            (900, " · int8 · 142 MB"),
        ):
            chat.page.set_viewport_size({"width": width_px, "height": 844})
            expect(option).to_have_text(f"{name}{text}")
            scroll_px, client_px = chat.page.evaluate(
                "[document.body.scrollWidth, document.body.clientWidth]"
            )
            assert scroll_px <= client_px


BASELINES = """["#hint", "#context-text"].map((selector) => {
  const mark = document.createElement("img");  // an empty inline box: its bottom is on the baseline
  document.querySelector(selector).append(mark);
  const { bottom } = mark.getBoundingClientRect();
  mark.remove();
  return bottom;
})"""


def test_what_is_below_the_field_is_on_one_line(chat: ChatPage, fake: FakeChatServer) -> None:
    chat.ask("Hi")
    hint_px, context_px = chat.page.evaluate(BASELINES)
    assert hint_px == pytest.approx(context_px, abs=0.5)
