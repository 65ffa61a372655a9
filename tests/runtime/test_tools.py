from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import END_OF_TEXT, IM_END, IM_START, TEMPLATE, VOCABULARY, tokenizer_json
from pocketlm.constraint import ConstraintFactory
from pocketlm.errors import InvalidSettingError, PromptError
from pocketlm.manifest import Tokens
from pocketlm.tokenizer import Tokenizer, ToolMessage
from pocketlm.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    Tool,
    ToolCall,
    ToolCallParser,
    ToolChoice,
    ToolFormat,
    tool_format,
)

# Short, with the same markers and the same reading of messages as the models' own.
QWEN = (
    "{%- if tools %}<|im_start|>system\n# Tools\n<tools>{%- for tool in tools %}\n{{ tool | tojson }}"
    "{%- endfor %}\n</tools>\nAnswer with <tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n{%- endif %}'
    "{%- for message in messages %}\n<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for tool_call in message.tool_calls %}{%- set call = tool_call.function %}\n<tool_call>\n"
    '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>'
    "{%- endfor %}<|im_end|>{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n<|im_start|>assistant\n{%- endif %}"
)
SMOLLM3 = QWEN.replace("{%- if tools %}", "{%- if xml_tools or tools %}")
LLAMA3 = (
    "{%- if tools is not none %}Respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "{%- for t in tools %}{{ t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
    "{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "{%- if 'tool_calls' in message %}{%- set call = message.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", ' }}{{ '\"parameters\": ' }}{{ call.arguments | tojson }}{{ '}' }}"
    "{%- else %}{{ message.content }}{%- endif %}<|eot_id|>{%- endfor %}"
)
MISTRAL3 = (
    "{%- if tools is not none %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif %}"
    "{%- for message in messages %}{%- if message.tool_calls is defined %}[TOOL_CALLS] ["
    "{%- for call in message.tool_calls %}{{ call.function | tojson }}{%- endfor %}]"
    '{%- elif message.role == "tool" %}[TOOL_RESULTS] {{ message.content }}[/TOOL_RESULTS]'
    "{%- else %}[INST] {{ message.content }}[/INST]{%- endif %}{%- endfor %}"
)

EOS = (END_OF_TEXT, IM_END)
TOKENS = Tokens(bos=None, eos=EOS, add_bos=False)
TOKENIZER = Tokenizer(tokenizer_json(), None, TOKENS)
FACTORY = ConstraintFactory(TOKENIZER, VOCABULARY, EOS)


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


WEATHER = function(
    "get_weather",
    description="The weather.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "maximum": 7}},
        "required": ["city"],
    },
)
TOOLS = [Tool.parse(WEATHER), Tool.parse(function("now"))]
OSLO, NOW = ToolCall("get_weather", {"city": "Oslo", "days": 3}), ToolCall("now", {})


def written(calls: list[ToolCall], form: ToolFormat) -> str:
    """The calls as the format has them, and as `json.dumps` spaces them."""
    parts = [json.dumps({"name": call.name, form.arguments: call.arguments}) for call in calls]
    if form is MISTRAL:
        return f"[TOOL_CALLS] [{', '.join(parts)}]"
    return "\n".join(f"{form.begin}{part}{form.end}" for part in parts)


def holds(form: ToolFormat, choice: Any, text: str, **options: Any) -> str:
    """complete, open, or what of `text` the grammar lets through."""
    grammar = form.grammar(TOOLS, ToolChoice.parse(choice, TOOLS), **options)
    assert grammar is not None
    constraint = FACTORY.constraint(grammar)
    ids = TOKENIZER.encode(text)
    for index, token_id in enumerate(ids):
        logits = np.zeros(VOCABULARY, np.float32)
        constraint.mask(logits)
        if logits[token_id] != 0:
            return TOKENIZER.decode(ids[:index], skip_special=False)
        constraint.accept(token_id)
    return "complete" if constraint.complete else "open"


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (QWEN, HERMES),
        (SMOLLM3, HERMES),
        (LLAMA3, LLAMA),
        (MISTRAL3, MISTRAL),
        (TEMPLATE, None),
        (None, None),
        ("{{ tools }}", None),
        (QWEN.replace('"arguments"', "<arg_key>"), None),
        (MISTRAL3 + "[ARGS]", None),
    ],
)
def test_the_format_follows_from_the_template(template: str | None, form: ToolFormat | None) -> None:
    assert tool_format(template) is form


@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL], ids=lambda form: form.name)
class TestGrammar:
    def test_a_required_call_is_all_there_is(self, form: ToolFormat) -> None:
        assert holds(form, "required", written([OSLO], form)) == "complete"
        assert holds(form, "required", written([NOW], form)) == "complete"
        assert holds(form, "required", "") == "open"
        assert holds(form, "required", "Hi") == ""

    def test_arguments_follow_their_schema(self, form: ToolFormat) -> None:
        broken = written([ToolCall("get_weather", {"city": "Oslo", "days": 8})], form)
        assert holds(form, "required", broken).endswith('"days": ')
        assert holds(form, "auto", broken).endswith('"days": ')
        missing = written([ToolCall("get_weather", {"days": 1})], form)
        assert holds(form, "auto", missing).endswith(f'"{form.arguments}": {{"')
        extra = written([ToolCall("now", {"x": 1})], form)
        assert holds(form, "auto", extra).endswith(f'"{form.arguments}": {{')

    def test_a_named_function_is_the_only_one(self, form: ToolFormat) -> None:
        assert holds(form, function("now"), written([NOW], form)) == "complete"
        assert holds(form, function("now"), written([OSLO], form)).endswith('{"name": "')
        assert holds(form, function("now"), written([NOW, NOW], form)) != "complete"

    def test_unless_it_calls_the_answer_is_free(self, form: ToolFormat) -> None:
        assert holds(form, "auto", "It is\nfine [1] <b>{x}</b>.") == "complete"
        assert holds(form, "auto", "") == "complete"
        assert holds(form, "auto", written([OSLO], form)) == "complete"

    def test_none_is_no_grammar(self, form: ToolFormat) -> None:
        assert form.grammar(TOOLS, ToolChoice.parse("none", TOOLS)) is None
        assert form.grammar([], ToolChoice.parse(None, [])) is None

    def test_a_tool_without_a_sound_schema(self, form: ToolFormat) -> None:
        tool = Tool.parse(function("f", parameters={"properties": {"a": {"uniqueItems": True}}}))
        with pytest.raises(InvalidSettingError, match="tool f: json_schema at #/properties/a: uniqueItems"):
            form.grammar([tool], ToolChoice("auto"))

    def test_calls_are_found_however_the_text_comes(self, form: ToolFormat) -> None:
        text = written([OSLO] if form is LLAMA else [OSLO, NOW], form)
        parser = ToolCallParser(form)
        parts = [part for piece in text for part in parser.feed(piece)] + parser.finish()
        assert parts == ([OSLO] if form is LLAMA else [OSLO, NOW])
        assert form.parse(text) == (parts, "")


@pytest.mark.parametrize("form", [HERMES, MISTRAL], ids=lambda form: form.name)
def test_several_calls_and_text_before_them(form: ToolFormat) -> None:
    text = written([OSLO, NOW], form)
    for choice in ("required", "auto"):
        assert holds(form, choice, text) == "complete"
        assert holds(form, choice, text, parallel=False) == written([OSLO], form).removesuffix("]")
    assert holds(form, "auto", f"Let me see.\n{text}") == "complete"
    assert holds(form, "required", f"Let me see.\n{text}") == ""
    assert holds(form, "auto", f"{text} bye") == text
    assert form.parse(f"Let me see.\n{text}") == ([OSLO, NOW], "Let me see.")


def test_a_marker_that_is_a_special_token() -> None:
    text = written([NOW], MISTRAL).replace("[TOOL_CALLS]", "<|im_start|>")
    assert holds(MISTRAL, "auto", f"Well {text}", marker_id=IM_START) == "complete"
    assert holds(MISTRAL, "required", text, marker_id=IM_START) == "complete"
    assert holds(MISTRAL, "required", "[TOOL", marker_id=IM_START) == ""
    marked = ToolFormat("marked", "<|im_start|> ", "", "arguments", is_list=True)
    assert marked.marker_id(TOKENIZER) == IM_START
    assert MISTRAL.marker_id(TOKENIZER) is None
    assert LLAMA.marker_id(TOKENIZER) is None


@pytest.mark.parametrize(
    ("form", "text", "calls", "rest"),
    [
        (HERMES, '<tool_call>{"name": "now", "arguments": {}}', [NOW], ""),  # never closed
        (HERMES, '<tool_call>{"name": "now", "arguments": {}} bye', [NOW], "bye"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>', ["f"], ""),
        (
            HERMES,
            'a <tool_call> no </tool_call> b<tool_call>{"name": "now", "arguments": {}}</tool_call>c',
            [NOW],
            "a <tool_call> no </tool_call> bc",
        ),
        (HERMES, '<tool_call>{"name": "now", "arg', [], '<tool_call>{"name": "now", "arg'),
        (HERMES, '<tool_call>{"name": 3}</tool_call>', [], '<tool_call>{"name": 3}</tool_call>'),
        (HERMES, "<tool_call>{nothing}</tool_call>", [], "<tool_call>{nothing}</tool_call>"),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": []}x',
            [],
            '<tool_call>{"name": "f", "arguments": []}x',
        ),
        (HERMES, "1 <tool", [], "1 <tool"),
        (
            HERMES,
            '<tool_call>{"name": "f", "parameters": {"a": [1.5e3, true, "\\u00e9\\"}"]}}</tool_call>',
            ["f"],
            "",
        ),
        (LLAMA, ' {"name": "now", "parameters": {}}', [NOW], ""),
        (LLAMA, '{"name": "now", "parameters": {}} so', [NOW], "so"),
        (LLAMA, '{"answer": 42}', [], '{"answer": 42}'),
        (LLAMA, 'So {"name": "now", "parameters": {}}', [], 'So {"name": "now", "parameters": {}}'),
        (LLAMA, " \n", [], " \n"),
        (MISTRAL, "[TOOL_CALLS]no", [], "[TOOL_CALLS]no"),
        (MISTRAL, "[TOOL_CALLS] [3]", [], "[TOOL_CALLS] [3]"),
        (MISTRAL, '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "x"}]', [NOW], ""),
    ],
)
def test_what_models_write_without_a_grammar(
    form: ToolFormat, text: str, calls: list[Any], rest: str
) -> None:
    found, around = form.parse(text)
    assert [call if call in calls else call.name for call in found] == calls
    assert around == rest
    parser = ToolCallParser(form)
    parts = [part for piece in text for part in parser.feed(piece)] + parser.finish()
    assert [part for part in parts if isinstance(part, ToolCall)] == found
    assert "".join(part for part in parts if isinstance(part, str)) == around


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "\n",
    " ",
    "{",
    "}",
    '"',
    "\\",
    "[TOOL_CALLS]",
    "[",
    "]",
    "hi",
    "<tool",
    '{"name": "now", "arguments": {}}',
    '[{"name": "now", "arguments": {}}]',
]


@given(st.sampled_from([HERMES, LLAMA, MISTRAL]), st.lists(st.sampled_from(FRAGMENTS)), st.data())
def test_pieces_change_nothing(form: ToolFormat, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    calls, rest = form.parse(text)
    parser, parts, begin = ToolCallParser(form), [], 0
    while begin < len(text):
        end = begin + data.draw(st.integers(1, 7))
        parts += parser.feed(text[begin:end])
        begin = end
    parts += parser.finish()
    assert [part for part in parts if isinstance(part, ToolCall)] == calls
    assert "".join(part for part in parts if isinstance(part, str)) == rest
    if not calls:
        assert rest == text


def test_text_comes_as_soon_as_it_cannot_be_a_call() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.feed("Hello <") == ["Hello"]
    assert parser.feed("b> ") == [" <b>"]
    assert parser.feed("x") == [" x"]


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"name": "f"}, "a tool is .*expected"),
        ("f", "a tool is 'f'"),
        ({"type": "retrieval", "function": {"name": "f"}}, "a tool is"),
        (function("two words"), "name is 'two words'"),
        (function("f" * 65), "1 to 64"),
        (function("f", arguments={}), "the field 'arguments'"),
        (function("f", description=3), "tool f: description"),
        (function("f", parameters=[1]), "tool f: .*parameters a JSON schema"),
        (function("f", parameters={"type": "array"}), "have the type 'array', expected object"),
    ],
)
def test_what_is_no_tool(tool: Any, message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        Tool.parse(tool)


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("always", TOOLS, "tool_choice is 'always', expected"),
        ({"name": "now"}, TOOLS, "expected"),
        (function("nwo"), TOOLS, "the tools are get_weather, now. Did you mean now"),
        ("required", [], "there are no tools"),
        (function("now"), [], "there are no tools"),
    ],
)
def test_what_is_no_choice(choice: Any, tools: list[Tool], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        ToolChoice.parse(choice, tools)


def test_what_is_a_choice() -> None:
    assert ToolChoice.parse(None, TOOLS) == ToolChoice("auto")
    assert ToolChoice.parse(None, []) == ToolChoice.parse("none", []) == ToolChoice("none")
    assert ToolChoice.parse(function("now"), TOOLS) == ToolChoice("required", "now")


def test_a_tool_and_a_call_as_the_api_has_them() -> None:
    assert TOOLS[0].as_dict() == WEATHER
    assert TOOLS[1].as_dict() == function(
        "now", description="", parameters={"type": "object", "properties": {}}
    )
    assert ToolCall("f", {"x": "é"}).as_dict("c1") == {"id": "c1", **function("f", arguments='{"x": "é"}')}


CONVERSATION: list[ToolMessage] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [OSLO.as_dict("c1")]},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "get_weather"},
]


@pytest.mark.parametrize(("template", "form"), [(QWEN, HERMES), (LLAMA3, LLAMA), (MISTRAL3, MISTRAL)])
def test_templates_show_tools_calls_and_results(template: str, form: ToolFormat) -> None:
    tokenizer = Tokenizer(tokenizer_json(), template, TOKENS)
    assert tokenizer.has_tools
    text = tokenizer.render_chat(CONVERSATION, tools=[WEATHER])
    assert '"get_weather"' in text.partition("Weather?")[0]
    assert written([OSLO], form).partition("{")[2].removesuffix("]") in text
    assert "sunny" in text
    assert tokenizer.encode_chat(CONVERSATION, tools=[WEATHER]) == tokenizer.encode(text)
    assert "get_weather" not in tokenizer.render_chat(CONVERSATION[:1])


def test_a_message_that_only_calls_needs_no_content() -> None:
    tokenizer = Tokenizer(tokenizer_json(), QWEN, TOKENS)
    silent: Any = [{"role": "assistant", "content": None, "tool_calls": [OSLO.as_dict("c1")]}]
    assert "None" not in tokenizer.render_chat(silent)
    with pytest.raises(PromptError, match="message 0 is"):
        tokenizer.render_chat([{"role": "assistant", "content": None}])  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "call", [3, {}, function("f"), function("f", arguments="{"), function("f", arguments="[]")]
)
def test_a_message_with_a_broken_call(call: Any) -> None:
    tokenizer = Tokenizer(tokenizer_json(), QWEN, TOKENS)
    message: ToolMessage = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(PromptError, match="message 0 has the tool call"):
        tokenizer.render_chat([message])


def test_a_template_without_tools() -> None:
    tokenizer = Tokenizer(tokenizer_json(), TEMPLATE, TOKENS)
    assert not tokenizer.has_tools
    with pytest.raises(PromptError, match="chat template has no tools"):
        tokenizer.render_chat(CONVERSATION[:1], tools=[WEATHER])
