"""The chat page when things go wrong: hostile answers, errors, lost connections, no storage."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from helpers.accessibility import faults
from helpers.chat_page import PHONE, ChatPage, chat_page, expect
from helpers.fake_chat_server import Answer, Drop, Fail, FakeChatServer, Hold, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser


HOSTILE = """<img src=x onerror="window.hit=1"> <script>window.hit=2</script>

<script>window.hit=3</script>

[a](javascript:window.hit=4) [b](&#106;avascript:window.hit=5) [c](java\tscript:window.hit=6)
[d](data:text/html,<script>window.hit=7</script>) [e](vbscript:x) <javascript:window.hit=8>
![i](http://example.org/tracker.png) ![j](javascript:window.hit=9) [ok](https://example.org/?a=1&amp;b=2)

<iframe src="http://example.org"></iframe><svg onload="window.hit=10"></svg><style>*{display:none}</style>

| <b>x</b> | y |
|---|---|
| <img src=x onerror=window.hit=11> | `<i>` |

```html"><img src=x onerror=window.hit=12>
<script>window.hit=13</script>
```
"""


def test_nothing_that_a_model_writes_becomes_code(chat: ChatPage, fake: FakeChatServer) -> None:
    fake.answers.append(Answer([HOSTILE[start : start + 7] for start in range(0, len(HOSTILE), 7)]))
    chat.ask("<img src=x onerror=window.hit=14>")
    chat.reload()  # what was kept is as hostile
    assert chat.page.evaluate("() => window.hit") is None
    expect(chat.bubbles).to_have_text("<img src=x onerror=window.hit=14>")
    inside = chat.answers.locator("img, script, iframe, svg[onload], style, b, i")
    expect(inside).to_have_count(0)
    links = chat.answers.locator("a").evaluate_all(
        "(links) => links.map((each) => [each.href, each.target, each.rel])"
    )
    assert links == [
        [href, "_blank", "noopener noreferrer"]
        for href in ("http://example.org/tracker.png", "https://example.org/?a=1&b=2")
    ]
    for text in (
        "<script>window.hit=3</script>",
        "[a](javascript:window.hit=4)",
        "Image: i",
        "&#106;avascript",
    ):
        expect(chat.answers).to_contain_text(text)


FRAGMENTS = [
    *(
        "word ",
        "**bold",
        "** ",
        "*it*",
        "`code` ",
        "~~no~~",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "# Title\n",
        "===\n",
    ),
    *(
        "- item\n",
        "  - inner\n",
        "- [ ] task\n",
        "1. one\n",
        "> quote\n",
        "---\n",
        "    indented\n",
        "```py\n",
    ),
    *("```\n", "| a | b |\n|---|---|\n", "| 1 | 2 |\n", "[x]: http://y.z\n", "[x] ", "[l](http://a.b) "),
    *("<b>", "</b>", "&amp;", "&lt;", "\\*"),
]

_DIFFERENT = """async ([texts, step]) => {
  const { MarkdownStream, renderMarkdown } = await import("/page/markdown.js");
  return texts.filter((text) => {
    const whole = document.createElement("div");
    whole.append(...renderMarkdown(text));
    const streamed = document.createElement("div");
    const stream = new MarkdownStream(streamed);
    for (let start = 0; start < text.length; start += step) {
      stream.push(text.slice(start, start + step));
      stream.flush();
    }
    stream.end();
    whole.normalize();
    streamed.normalize();
    return whole.innerHTML !== streamed.innerHTML;
  });
}"""


@pytest.mark.parametrize("step", [1, 5])
def test_a_streamed_answer_looks_like_a_whole_one(tab: ChatPage, fake: FakeChatServer, step: int) -> None:
    if not tab.page.url.startswith(fake.url):
        tab.open()
    rng = random.Random(step)
    texts = ["".join(rng.choices(FRAGMENTS, k=rng.randint(1, 14))) for _ in range(150)]
    texts.append("1. one\n\n2. two\n\n3. three\n\n   more\n\n4 is no item")
    assert tab.page.evaluate(_DIFFERENT, [texts, step]) == []


@pytest.mark.parametrize("text", [">" * 6000 + " deep", "- " * 3000 + "x", "[" * 4000, "_a" * 4000])
def test_text_that_is_hard_to_read_is_shown_all_the_same(
    tab: ChatPage, fake: FakeChatServer, text: str
) -> None:
    if not tab.page.url.startswith(fake.url):
        tab.open()
    shown, depth = tab.page.evaluate(
        """async (text) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const root = document.createElement("div");
          root.append(...renderMarkdown(text));
          let depth = 0;
          for (let node = root; node; node = node.firstElementChild) depth += 1;
          return [root.textContent, depth];
        }""",
        text,
    )
    assert shown.rstrip()[-4:].strip() == text.rstrip()[-4:].strip()
    assert depth < 120


def test_a_wanted_key_is_asked_for_and_kept(browser: Browser, fake: FakeChatServer) -> None:
    fake.key = "s3cret"
    with chat_page(browser, fake, opened=False) as chat:
        chat.page.goto(fake.url)
        dialog = chat.page.get_by_role("dialog", name="API key")
        expect(chat.page.get_by_label("Key", exact=True)).to_be_focused()
        expect(dialog).to_contain_text("Whoever started the server has it")
        expect(dialog).not_to_contain_text("Bearer")
        expect(dialog.get_by_role("alert")).to_be_hidden()
        assert faults(chat.page) == []
        chat.page.keyboard.type("wrong")
        chat.page.keyboard.press("Enter")
        expect(chat.page.get_by_label("Key", exact=True)).to_have_value("")
        expect(dialog.get_by_role("alert")).to_contain_text("does not know this key")
        assert faults(chat.page) == []
        chat.page.keyboard.type("s3cret")
        chat.page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        chat.page.locator("#model:enabled").wait_for()
        chat.reload()
        assert chat.page.evaluate("localStorage.length") == 0
        fake.key = "another"
        chat.type_and_send("Hi")
        chat.page.get_by_label("Key", exact=True).fill("another")
        chat.page.get_by_label("Remember on this device").check()
        chat.button("Continue").click()
        expect(chat.answers).to_have_text("You said: Hi")
        later = ChatPage(chat.page.context.new_page(), fake)
        later.open()
        fake.key = "third"
        later.type_and_send("Hi")
        later.page.get_by_role("dialog", name="API key").get_by_role("button", name="Cancel").click()
        problem = later.page.get_by_role("alert")
        expect(problem).to_contain_text("The server wants an API key")
        expect(problem).not_to_contain_text("Bearer")


def test_a_loading_model_is_waited_for(chat: ChatPage, fake: FakeChatServer) -> None:
    fake.loading = True
    chat.type_and_send("Hi")
    expect(chat.page.locator(".waiting")).to_contain_text("Loading the model")
    fake.loading = False
    expect(chat.answers).to_have_text("You said: Hi")
    chat.wait_until_idle()
    assert len(fake.requests) == 1


def test_a_message_may_be_sent_before_the_models_are_known(browser: Browser, fake: FakeChatServer) -> None:
    fake.loading = True
    with chat_page(browser, fake, opened=False) as chat:
        chat.page.goto(fake.url)
        expect(chat.page.locator("#notices")).to_contain_text("The server is loading its model.")
        chat.type_and_send("Hi")
        expect(chat.page.locator(".waiting")).to_contain_text("Loading the model")
        fake.loading = False
        expect(chat.answers).to_have_text("You said: Hi")
        expect(chat.page.locator("#notices")).to_be_empty()
        expect(chat.page.get_by_label("Model", exact=True)).to_have_value("small")
        assert "model" not in fake.requests[0]


def test_a_full_queue_is_tried_again(chat: ChatPage, fake: FakeChatServer) -> None:
    fake.answers += [Fail(503, "The queue is full.", "queue_full", retry_after_s=0.3)] * 2
    chat.type_and_send("Hi")
    expect(chat.page.locator(".waiting")).to_contain_text("The server is busy. Trying again in 1 s")
    expect(chat.answers).to_have_text("You said: Hi")
    chat.wait_until_idle()
    assert len(fake.requests) == 3


def test_a_busy_server_that_names_no_time_is_left_to_the_user(chat: ChatPage, fake: FakeChatServer) -> None:
    fake.answers.append(Fail(503, "No memory for another model."))
    chat.ask("Hi")
    expect(chat.page.get_by_role("alert")).to_contain_text("No memory for another model.")
    chat.button("Try again").click()
    expect(chat.answers).to_have_text("You said: Hi")


OVERFLOW = "The prompt has 3,000 tokens, but the context holds 2,048 (and an answer needs at least one)."


def test_a_conversation_beyond_the_context_offers_a_way_on(chat: ChatPage, fake: FakeChatServer) -> None:
    chat.ask("first")
    chat.ask("second")
    fake.answers.append(Fail(400, OVERFLOW, "context_length_exceeded"))
    chat.ask("third")
    expect(chat.page.get_by_role("alert")).to_contain_text("3,000 tokens, but the context holds 2,048")
    assert faults(chat.page) == []
    chat.button("Leave out the oldest messages").click()
    expect(chat.page.locator(".divider")).to_be_visible()
    chat.wait_until_idle()
    assert fake.requests[-1]["messages"] == [{"role": "user", "content": "third"}]
    expect(chat.bubbles).to_have_text(["first", "second", "third"])
    fake.answers.append(Fail(400, OVERFLOW, "context_length_exceeded"))
    chat.button("New chat").first.click()
    chat.ask("alone")
    chat.button("Leave out the oldest messages").click()
    expect(chat.page.locator("#notices")).to_contain_text("There is only one message to send")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Drop(), "The connection was lost before the answer was complete."),
        (Fail(500, "The engine stopped."), "The engine stopped."),
    ],
)
def test_a_broken_answer_keeps_its_beginning(
    chat: ChatPage, fake: FakeChatServer, fault: object, says: str
) -> None:
    fake.answers.append(Answer(["The beginning", fault]))
    chat.ask("Hi")
    expect(chat.answers).to_have_text("The beginning")
    expect(chat.page.get_by_role("alert")).to_contain_text("What had come until then is kept above.")
    expect(chat.page.get_by_role("alert")).to_contain_text(says)
    chat.button("Try again").click()
    expect(chat.answers).to_have_text("You said: Hi")


@pytest.mark.parametrize("steps", [["All of it"], ["A part", Fail(500, "The engine stopped.")]])
def test_a_complete_answer_is_read_to_the_end_of_its_body(
    chat: ChatPage, fake: FakeChatServer, steps: list[object]
) -> None:
    end = Hold()
    fake.answers.append(Answer(steps, end=end))
    chat.ask("Hi")  # whose end is shown at the last event, before the body's
    with chat.page.expect_event("requestfinished", lambda each: each.url.endswith("/v1/chat/completions")):
        end.set()
    assert fake.abandoned == []


def test_a_server_that_is_gone_is_told_apart(chat: ChatPage, fake: FakeChatServer) -> None:
    chat.page.context.set_offline(True)
    chat.ask("Hi")
    expect(chat.page.get_by_role("alert")).to_contain_text(
        "The server cannot be reached. Is it still running?"
    )
    chat.page.context.set_offline(False)
    chat.button("Try again").click()
    expect(chat.answers).to_have_text("You said: Hi")


def test_a_refused_request_is_shown_as_text(chat: ChatPage, fake: FakeChatServer) -> None:
    fake.answers.append(Fail(400, "min_p is <b>7</b>, expected a number from 0 to 1.", "invalid_value"))
    chat.ask("Hi")
    expect(chat.page.get_by_role("alert")).to_contain_text("min_p is <b>7</b>, expected")
    chat.ask("Again")
    assert fake.requests[-1]["messages"] == [{"role": "user", "content": "Hi\n\nAgain"}]


def test_a_page_that_was_closed_keeps_what_had_come(chat: ChatPage, fake: FakeChatServer) -> None:
    fake.answers.append(Answer(["Half an ", Hold()]))
    chat.type_and_send("Hi")
    expect(chat.answers).to_have_text("Half an")
    chat.reload()
    expect(chat.answers).to_have_text("Half an")
    expect(chat.page.get_by_role("alert")).to_contain_text(
        "The page was closed before the answer was complete."
    )
    wait_until(lambda: len(fake.abandoned) == 1)


NO_STORAGE = """for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("forbidden", "SecurityError"); } });
}"""
FULL = """IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };
Object.defineProperty(navigator, "clipboard", { value: undefined });"""


def test_without_storage_the_page_works_and_says_so(browser: Browser, fake: FakeChatServer) -> None:
    with chat_page(browser, fake, script=NO_STORAGE) as chat:
        expect(chat.page.locator("#notices")).to_contain_text("This browser keeps nothing for this page")
        chat.button("Dark appearance").click()
        chat.ask("Hi")
        expect(chat.answers).to_have_text("You said: Hi")
        assert chat.titles == ["Hi"]


def test_full_storage_is_said_and_copying_works_without_the_clipboard(
    browser: Browser, fake: FakeChatServer
) -> None:
    with chat_page(browser, fake, script=FULL) as chat:
        chat.ask("Hi")
        expect(chat.page.locator("#notices")).to_contain_text("The browser's storage is full")
        expect(chat.answers).to_have_text("You said: Hi")
        chat.button("Copy the answer").click()
        chat.prompt.press("Control+v")
        expect(chat.prompt).to_have_value("You said: Hi")


RICH = """# Title

Text with `code`, a [link](http://a.b) and *more*.

> quote

- [x] task

```py
x
```

| a |
|---|
| b |
"""


@pytest.mark.parametrize(("colors", "phone"), [("light", False), ("dark", True)])
def test_names_and_contrast_are_sound(
    browser: Browser, fake: FakeChatServer, colors: str, phone: bool
) -> None:
    with chat_page(browser, fake, color_scheme=colors, **(PHONE if phone else {})) as chat:
        assert faults(chat.page) == []
        fake.answers += [Answer([RICH]), Fail(400, "No.")]
        chat.ask("Hi")
        chat.page.locator(".figures summary").click()
        chat.ask("Again")
        assert faults(chat.page) == []
        chat.button("Settings").click()
        chat.page.get_by_label("Top p").fill("3")
        chat.page.get_by_text("Keyboard").click()
        assert faults(chat.page) == []
        chat.button("Close the settings").click()
        if phone:
            chat.button("Conversations").click()
        chat.button("More for Hi").click()
        assert faults(chat.page) == []
        chat.page.keyboard.press("Escape")
        chat.button("Delete all").click()
        assert faults(chat.page) == []


def test_the_checks_of_accessibility_find_faults(tab: ChatPage, fake: FakeChatServer) -> None:
    tab.page.goto("about:blank")
    tab.page.set_content(
        "<button></button><i id=a></i><i id=a></i><label for=b>x</label><p style='color: #999'>faint</p>"
    )
    assert [fault.split(":")[0] for fault in faults(tab.page)] == [
        "no name", "id twice", "names nothing", "too faint"
    ]  # fmt: skip
