"""What people do on the chat page, in a real browser before a scripted server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from helpers.chat_page import PHONE, ChatPage, chat_page, expect
from helpers.fake_chat_server import ABSENT, ESTIMATED, Answer, FakeChatServer, Hold, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def fresh(tab: ChatPage, fake: FakeChatServer) -> Iterator[ChatPage]:
    """A page that nobody has used."""
    tab.reset()
    yield tab
    tab.stale = True
    assert tab.problems == []


def test_an_answer_streams_and_says_what_it_cost(chat: ChatPage, fake: FakeChatServer) -> None:
    hold = Hold()
    fake.answers.append(Answer(["One ", "two ", hold, "**thr", "ee**"]))
    chat.type_and_send("Count")
    expect(chat.answers).to_have_text("One two")
    expect(chat.page.locator("#stop")).to_be_visible()
    expect(chat.page.locator("#send")).to_be_hidden()
    expect(chat.page.locator(".cost")).to_contain_text("first token")
    hold.set()
    chat.wait_until_idle()
    expect(chat.answers).to_have_text("One two three")
    expect(chat.answers.locator("strong")).to_have_text("three")
    expect(chat.page.locator(".figures summary")).to_have_text(
        re.compile(r"^31\.3\stok/s · first\stoken\s\d+\.\d\d\ss · 4\.21\sJ$")
    )
    expect(chat.page.locator("#context-text")).to_have_text("44 of 2,048 tokens of context")
    assert fake.requests == [
        {
            "model": "small",
            "messages": [{"role": "user", "content": "Count"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


@pytest.mark.parametrize("by", ["button", "key"])
def test_a_stopped_answer_keeps_what_came(chat: ChatPage, fake: FakeChatServer, by: str) -> None:
    fake.answers.append(Answer(["Once upon ", Hold(), "never"]))
    chat.type_and_send("A story")
    expect(chat.answers).to_have_text("Once upon")
    if by == "button":
        chat.button("Stop answering").click()
    else:
        chat.page.keyboard.press("Escape")
    chat.wait_until_idle()
    expect(chat.page.locator(".ending")).to_have_text("Stopped")
    chat.ask("Go on")
    assert fake.requests[-1]["messages"] == [
        {"role": "user", "content": "A story"},
        {"role": "assistant", "content": "Once upon "},
        {"role": "user", "content": "Go on"},
    ]
    wait_until(lambda: len(fake.abandoned) == 1)


def test_editing_a_message_drops_what_followed(fresh: ChatPage, fake: FakeChatServer) -> None:
    fresh.ask("first")
    fresh.ask("second")
    fresh.page.locator(".message.user").first.hover()
    fresh.page.locator(".message.user").first.get_by_role("button", name="Edit the message").click()
    field = fresh.page.get_by_label("Edit the message").and_(fresh.page.locator("textarea"))
    expect(field).to_be_focused()
    field.fill("other")
    field.press("Enter")
    expect(fresh.answers).to_have_text(["You said: other"])
    fresh.wait_until_idle()
    expect(fresh.bubbles).to_have_text(["other"])
    assert fake.requests[-1]["messages"] == [{"role": "user", "content": "other"}]
    assert fresh.titles == ["other"]


def test_a_cancelled_edit_changes_nothing(chat: ChatPage, fake: FakeChatServer) -> None:
    chat.ask("first")
    chat.prompt.press("ArrowUp")
    field = chat.page.locator(".edit textarea")
    field.fill("other")
    field.press("Escape")
    expect(chat.bubbles).to_have_text(["first"])
    expect(chat.button("Edit the message")).to_be_focused()
    assert len(fake.requests) == 1


def test_an_answer_can_be_given_again(chat: ChatPage, fake: FakeChatServer) -> None:
    fake.answers += [Answer(["bad"]), Answer(["good"])]
    chat.ask("Try")
    chat.button("Answer again").click()
    expect(chat.answers).to_have_text(["good"])
    chat.wait_until_idle()
    assert fake.requests[0] == fake.requests[1]
    expect(chat.page.locator("#notices")).to_be_empty()
    fake.answers.append(Answer(["good"]))
    chat.button("Answer again").click()
    expect(chat.page.locator("#notices")).to_contain_text("It is the same answer")


def test_an_answer_goes_on_while_another_conversation_is_open(chat: ChatPage, fake: FakeChatServer) -> None:
    hold = Hold()
    fake.answers.append(Answer(["slow ", hold, "but sure"]))
    chat.type_and_send("tortoise")
    expect(chat.answers).to_have_text("slow")
    chat.page.keyboard.press("Control+Shift+O")
    chat.ask("hare")
    expect(chat.page.get_by_role("img", name="answering")).to_have_count(1)
    chat.page.get_by_role("link", name="tortoise").click()
    expect(chat.answers).to_have_text("slow")
    hold.set()
    expect(chat.answers).to_have_text("slow but sure")
    chat.page.go_back()
    expect(chat.answers).to_have_text("You said: hare")


def test_answers_and_code_are_copied_as_they_were_written(chat: ChatPage, fake: FakeChatServer) -> None:
    text = "Look:\n\n```py\nprint('**hi**')\n```\n"
    fake.answers.append(Answer([text]))
    chat.ask("Code")
    expect(chat.page.locator(".code-head span")).to_have_text("py")
    chat.button("Copy the py code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "print('**hi**')"
    chat.button("Copy the answer").click()
    expect(chat.page.locator("#announcer")).to_contain_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == text


def test_settings_are_sent_only_where_they_are_set(fresh: ChatPage, fake: FakeChatServer) -> None:
    fresh.button("Settings").click()
    fresh.page.get_by_label("System prompt").fill("Be brief.")
    values = {"Temperature": "0.7", "Top p": "0.9", "Top k": "40", "Min p": "0.05", "Longest answer": "64"}
    for label, value in {**values, "Repetition penalty": "1.1", "Seed": "7"}.items():
        fresh.page.get_by_label(label, exact=True).fill(value)
    fresh.page.get_by_label("Top k", exact=True).fill("")
    fresh.page.get_by_label("Seed", exact=True).fill("-1")
    expect(fresh.page.get_by_text("A whole number from 0 to 4294967295.")).to_be_visible()
    fresh.button("Use for new chats too").click()
    fresh.button("Close the settings").click()
    fresh.ask("Hi")
    sent = {**fake.requests[0]}
    assert sent.pop("messages")[0] == {"role": "system", "content": "Be brief."}
    expected = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "max_tokens": 64, "repetition_penalty": 1.1}
    for name in ("model", "stream", "stream_options"):
        del sent[name]
    assert sent == {**expected, "seed": 7}

    fresh.reload()
    fresh.button("New chat").first.click()
    fresh.ask("Hi again")
    assert {**fake.requests[0], "messages": []} == {**fake.requests[1], "messages": []}
    fresh.button("Settings").click()
    fresh.page.get_by_label("Temperature").fill("2")
    fresh.button("Back to the defaults").click()
    expect(fresh.page.get_by_label("Temperature")).to_have_value("0.7")


def test_conversations_survive_a_reload(fresh: ChatPage, fake: FakeChatServer) -> None:
    fake.answers.append(Answer(["- a\n- b"], finish="length", energy=ESTIMATED))
    fresh.ask("List\nplease")
    fresh.button("New chat").first.click()
    fresh.ask("Another")
    fresh.reload()
    expect(fresh.answers).to_have_text(["You said: Another"])
    assert fresh.titles == ["Another", "List"]
    fresh.page.get_by_role("link", name="List").click()
    expect(fresh.bubbles).to_have_text(["List\nplease"])
    expect(fresh.answers.locator("li")).to_have_text(["a", "b"])
    expect(fresh.page.locator(".ending")).to_contain_text("Ended by the limit after 1 tokens")
    expect(fresh.page.locator(".figures summary")).to_contain_text("≈ 4.2 J estimated")


def test_conversations_are_renamed_and_deleted(fresh: ChatPage) -> None:
    for text in ("one", "two", "three"):
        fresh.button("New chat").first.click()
        fresh.ask(text)
    fresh.menu("two", "Rename")
    fresh.page.get_by_label("Title").fill("deux")
    fresh.page.keyboard.press("Enter")
    fresh.menu("three", "Delete")
    expect(fresh.button("Cancel")).to_be_focused()
    fresh.page.keyboard.press("Escape")
    assert fresh.titles == ["three", "deux", "one"]
    fresh.menu("three", "Delete")
    fresh.button("Delete").click()
    expect(fresh.page.locator("#empty")).to_be_visible()
    fresh.reload()
    assert fresh.titles == ["deux", "one"]
    fresh.button("Delete all").click()
    fresh.page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(fresh.page.locator("#conversations li")).to_have_count(0)
    fresh.reload()
    assert fresh.titles == []


def test_what_is_exported_can_be_imported(browser: Browser, fresh: ChatPage, fake: FakeChatServer) -> None:
    fresh.ask("Grüße & <b>")
    name, markdown = fresh.download(lambda: fresh.menu("Grüße & <b>", "Export as Markdown"))
    assert name.endswith(".md")
    assert markdown == "# Grüße & <b>\n\n**You**\n\nGrüße & <b>\n\n**small**\n\nYou said: Grüße & <b>\n"
    _, single = fresh.download(lambda: fresh.menu("Grüße & <b>", "Export as JSON"))
    name, text = fresh.download(fresh.button("Export all").click)
    assert name == "pocketlm-conversations.json"
    assert json.loads(single)["conversations"] == json.loads(text)["conversations"]

    with chat_page(browser, fake) as other:
        file = {"name": "x.json", "mimeType": "application/json", "buffer": text.encode()}
        for _ in range(2):  # what is there already stays, and gets a twin
            other.page.locator("#import-file").set_input_files(file)
            expect(other.page.get_by_text("1 conversation imported.")).to_be_visible()
            other.button("Close this notice").click()
        assert other.titles == ["Grüße & <b>"] * 2
        other.page.get_by_role("link", name="Grüße").first.click()
        expect(other.answers).to_have_text(["You said: Grüße & <b>"])
        expect(other.page.locator(".figures summary")).to_contain_text("4.21 J")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "This file is not JSON."),
        ("[1]", "This file holds no conversations"),
        ('{"format": "pocketlm-conversations", "version": 2, "conversations": []}', "has version 2"),
        (
            '{"format": "pocketlm-conversations", "version": 1, "conversations": [{"messages": [{}]}]}',
            "Conversation 1 of this file is damaged",
        ),
    ],
)
def test_a_file_that_is_no_export_is_refused(tab: ChatPage, content: str, message: str) -> None:
    if tab.page.url == "about:blank":
        tab.open()
    file = {"name": "x.json", "mimeType": "application/json", "buffer": content.encode()}
    before = tab.titles
    tab.page.locator("#import-file").set_input_files(file)
    expect(tab.page.locator("#notices")).to_contain_text(message)
    assert tab.titles == before


def test_another_model_can_be_picked(fresh: ChatPage, fake: FakeChatServer) -> None:
    expect(fresh.page.locator("#model option")).to_have_text(
        ["small · int8 · 142 MB", "larger · int4 · 1.3 GB"]
    )
    fresh.page.get_by_label("Model", exact=True).select_option("larger")
    hold = Hold()
    fake.answers.append(Answer([hold, "done"]))
    fresh.type_and_send("Hi")
    expect(fresh.page.locator(".waiting")).to_contain_text("Loading larger")
    hold.set()
    fresh.wait_until_idle()
    assert fake.requests[0]["model"] == "larger"
    expect(fresh.page.locator("#context-text")).to_contain_text("of 4,096 tokens")
    fresh.reload()
    expect(fresh.page.get_by_label("Model", exact=True)).to_have_value("larger")


def test_the_context_length_may_come_from_the_properties(tab: ChatPage, fake: FakeChatServer) -> None:
    fake.models = [{"id": "plain", "meta": None}]
    tab.reset()
    tab.stale = True
    tab.ask("Hi")
    expect(tab.page.locator("#context-text")).to_contain_text("of 1,024 tokens")


ENERGIES: list[tuple[dict[str, object] | None, list[str]]] = [
    (ESTIMATED, ["4.2 J, estimated, 4.2 J a token", "2.9 J to 5.6 J", "cpu-time: the server's share"]),
    (ABSENT, ["no figure: no sensor can be read here"]),
    (None, ["not known: the server tells it at the end"]),
]


def test_energy_says_where_it_is_from(chat: ChatPage, fake: FakeChatServer) -> None:
    for energy, rows in ENERGIES:
        fake.answers.append(Answer(["x"], energy=energy))
        chat.ask("Hi")
        chat.page.locator(".figures summary").last.focus()
        chat.page.keyboard.press("Enter")
        for row in rows:
            expect(chat.page.locator(".figures dl").last).to_contain_text(row)


def test_the_appearance_follows_the_system_until_it_is_chosen(fresh: ChatPage) -> None:
    fresh.page.emulate_media(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = fresh.page.evaluate(background)
    button = fresh.button("Dark appearance")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    light = fresh.page.evaluate(background)
    assert light == "rgb(255, 255, 255)" != dark
    fresh.reload()
    assert fresh.page.evaluate(background) == light
    fresh.button("Dark appearance").click()
    assert fresh.page.evaluate("localStorage.length") == 0
    fresh.page.emulate_media(color_scheme="light")
    assert fresh.page.evaluate(background) == light


def test_all_can_be_done_with_the_keyboard(fresh: ChatPage, fake: FakeChatServer) -> None:
    keyboard = fresh.page.keyboard
    expect(fresh.prompt).to_be_focused()
    backwards = 0
    while fresh.page.evaluate("() => document.activeElement.id") != "skip":
        keyboard.press("Shift+Tab")
        backwards += 1
        assert backwards < 12
    keyboard.press("Enter")
    keyboard.type("two")
    keyboard.press("Shift+Enter")
    keyboard.type("lines")
    keyboard.press("Enter")
    fresh.wait_until_idle()
    assert fake.requests[0]["messages"][0]["content"] == "two\nlines"
    expect(fresh.prompt).to_be_focused()
    expect(fresh.prompt).to_have_value("")
    keyboard.press("ArrowUp")
    keyboard.press("End")
    keyboard.type("!")
    keyboard.press("Enter")
    expect(fresh.answers).to_have_text(["You said: twolines!"])
    fresh.wait_until_idle()
    expect(fresh.prompt).to_be_focused()
    keyboard.press("Control+Shift+O")
    expect(fresh.page.locator("#empty")).to_be_visible()
    expect(fresh.prompt).to_be_focused()
    fake.answers.append(Answer(["x", Hold()]))
    keyboard.type("stop me")
    keyboard.press("Enter")
    expect(fresh.answers).to_have_text("x")
    keyboard.press("Tab")
    expect(fresh.button("Stop answering")).to_be_focused()
    keyboard.press("Space")
    fresh.wait_until_idle()
    expect(fresh.prompt).to_be_focused()


WIDE = f"""| a | b |
|---|---|
| {"word " * 30} | x |

```
{"long " * 80}
```

{"unbroken" * 40}"""
WIDTHS = """() => [...document.querySelectorAll("html, body, main, .scroller, .thread")]
  .map((each) => [each.scrollWidth, each.clientWidth])"""
GAP = "(scroller) => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"


def test_a_phone_shows_all_without_scrolling_sideways(browser: Browser, fake: FakeChatServer) -> None:
    with chat_page(browser, fake, **PHONE) as chat:
        fake.answers.append(Answer([WIDE]))
        chat.prompt.fill("x" * 300)
        chat.prompt.press("Enter")  # a touch keyboard has no Shift+Enter
        assert fake.requests == []
        chat.page.locator("#send").click()
        chat.wait_until_idle()
        for scroll_px, client_px in chat.page.evaluate(WIDTHS):
            assert scroll_px <= client_px
        assert chat.page.evaluate("innerWidth") == 360
        expect(chat.page.locator("#sidebar")).to_be_hidden()
        chat.button("Conversations").click()
        expect(chat.page.locator("#new-chat")).to_be_focused()
        assert chat.page.locator("#main").evaluate("(main) => main.inert")
        chat.page.keyboard.press("Escape")
        expect(chat.button("Conversations")).to_be_focused()
        chat.button("Conversations").click()
        chat.page.get_by_role("link", name="xxx").click()
        expect(chat.page.locator("#sidebar")).to_be_hidden()
        chat.button("Settings").click()
        box = chat.page.locator("#settings").bounding_box()
        assert box is not None and box["x"] >= 0 and box["width"] <= 360


def test_new_text_is_followed_only_from_the_bottom(chat: ChatPage, fake: FakeChatServer) -> None:
    hold = Hold()
    fake.answers.append(Answer(["line\n\n" * 60, hold, "more\n\n" * 20, "end"]))
    chat.type_and_send("Much")
    chat.page.get_by_text("line").nth(59).wait_for()
    scroller = chat.page.locator(".scroller")
    assert scroller.evaluate(GAP) < 2
    scroller.evaluate("(scroller) => scroller.scrollTo(0, 100)")
    expect(chat.button("Newest")).to_be_visible()
    hold.set()
    chat.wait_until_idle()
    assert scroller.evaluate("(scroller) => scroller.scrollTop") == 100
    chat.button("Newest").click()
    expect(chat.button("Newest")).to_be_hidden()
    assert scroller.evaluate(GAP) < 2


def test_a_screen_reader_hears_blocks_not_tokens(chat: ChatPage, fake: FakeChatServer) -> None:
    hold = Hold()
    fake.answers.append(Answer(["First ", "part.\n\n", "Second\n", hold, "part.\n\n```py\na\nb\n```"]))
    chat.type_and_send("Read")
    expect(chat.page.locator("#announcer p")).to_have_text(["First part."])
    hold.set()
    expect(chat.page.locator("#announcer p")).to_have_text(
        ["First part.", "Second part.", "Code block, py, 2 lines.", re.compile("^Answer complete after")]
    )


def test_tabs_know_of_each_other(fresh: ChatPage, fake: FakeChatServer) -> None:
    second = ChatPage(fresh.page.context.new_page(), fake)
    second.open()
    fresh.ask("from the first")
    expect(second.page.locator("#conversations")).to_have_text("from the first")
    second.page.get_by_role("link", name="from the first").click()
    second.ask("from the second")
    expect(fresh.bubbles).to_have_text(["from the first", "from the second"])
    second.menu("from the first", "Delete")
    second.button("Delete").click()
    expect(second.page.locator("#conversations li")).to_have_count(0)
    assert second.problems == []
    second.page.close()
