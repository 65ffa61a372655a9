"""Tool calls: what a model may call, how it writes a call, and how a call is found in its answer.

The chat template shows the tools to the model (`Tokenizer.render_chat(tools=…)`), and its text tells in which
of three forms the model was trained to answer:

    hermes    <tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>     Qwen, SmolLM3, Hermes
    llama     {"name": "f", "parameters": {…}}                              Llama 3.x
    mistral   [TOOL_CALLS] [{"name": "f", "arguments": {…}}]                Mistral
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketlm.constraint.grammar import Grammar, lark_schema, literal
from pocketlm.errors import InvalidSettingError, did_you_mean
from pocketlm.tokenizer import Tokenizer

MAX_TOOLS = 128
MAX_CALLS = 16  # in one answer

# A string that is cut off goes to the end.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of an object

    @classmethod
    def parse(cls, tool: Mapping[str, Any]) -> Tool:
        """Reads `{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}`.

        Raises InvalidSettingError for anything else. The schema itself is checked with the grammar.
        """
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise InvalidSettingError(
                f'a tool is {_short(tool)}, expected {{"type": "function", "function": {{"name": "…", …}}}}.'
            )
        unknown = sorted(function.keys() - {"name", "description", "parameters", "strict"})
        if unknown:
            raise InvalidSettingError(
                f"a tool's function has the field {unknown[0]!r}, expected name, description and parameters."
            )
        name, description = function.get("name"), function.get("description") or ""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidSettingError(
                f"a tool's name is {name!r}, expected 1 to 64 letters, digits, dots, dashes and underscores."
            )
        parameters = function.get("parameters") or {}
        if not isinstance(description, str) or not isinstance(parameters, Mapping):
            raise InvalidSettingError(f"tool {name}: description must be text, and parameters a JSON schema.")
        if parameters.get("type", "object") != "object":
            raise InvalidSettingError(
                f"tool {name}: parameters have the type {parameters['type']!r}, expected object."
            )
        return cls(name, description, {"type": "object", "properties": {}, **parameters})

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates read."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model calls a tool: never, if it wants to, or surely (`name`: this one)."""

    mode: str  # none, auto or required
    name: str | None = None

    @classmethod
    def parse(cls, choice: str | Mapping[str, Any] | None, tools: Sequence[Tool]) -> ToolChoice:
        """Reads "auto" (what None means), "none", "required", or a named function as the OpenAI API has it.

        Raises InvalidSettingError for anything else, and if there is no tool to call.
        """
        match choice:
            case None:
                return cls("auto" if tools else "none")
            case "none":
                return cls("none")
            case "auto" | "required" if tools:
                return cls(str(choice))
            case {"type": "function", "function": {"name": str(name)}} if tools:
                names = [tool.name for tool in tools]
                if name not in names:
                    raise InvalidSettingError(
                        f"tool_choice names {name!r}, but the tools are {', '.join(names)}."
                        f"{did_you_mean(name, names)}"
                    )
                return cls("required", name)
            case "auto" | "required" | {"type": "function"} if not tools:
                raise InvalidSettingError(f"tool_choice is {_short(choice)}, but there are no tools.")
        raise InvalidSettingError(
            f'tool_choice is {_short(choice)}, expected "auto", "none", "required" or '
            '{"type": "function", "function": {"name": "…"}}.'
        )


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for."""

    name: str
    arguments: Mapping[str, Any]

    def as_dict(self, call_id: str) -> dict[str, Any]:
        """An entry of an assistant message's `tool_calls`, arguments as text, as the OpenAI API has it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": call_id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls."""

    name: str
    begin: str  # before a call; empty if an answer that begins with a brace is one
    end: str  # behind a call
    arguments: str  # the key of a call's arguments
    is_list: bool = False  # the calls are one JSON list

    def marker_id(self, tokenizer: Tokenizer) -> int | None:
        """The special token that begins a call; None if plain text does.

        Special tokens are no part of decoded text: where this is an id, decode with `skip_special=False` for
        a parser to see it.
        """
        marker = self.begin.strip().encode()
        ids = (each for each in sorted(tokenizer.special_ids) if tokenizer.token_bytes(each) == marker)
        return next(ids, None)

    def grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        *,
        parallel: bool = True,
        marker_id: int | None = None,
    ) -> Grammar | None:
        """What an answer may be: None if anything.

        "auto" is free text, until it begins a call. `parallel` allows several calls in one answer, where the
        format does. `marker_id` is what the method of this name gives.

        Raises InvalidSettingError if the parameters of a tool are no schema that can be kept.
        """
        if choice.mode == "none" or not tools:
            return None
        callable_ = [tool for tool in tools if choice.name in (None, tool.name)]
        several = parallel and choice.name is None
        return Grammar.lark_text("tools", self._lark(callable_, choice.mode == "auto", several, marker_id))

    def _lark(self, tools: Sequence[Tool], free: bool, several: bool, marker_id: int | None) -> str:
        lines = [f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
        for index, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool.name)}, "{self.arguments}": '
            lines.append(f'call_{index}: {literal(head)} arguments_{index} "}}"')
            lines.append(f"arguments_{index}: {_arguments_schema(tool)}")

        def repeated(item: str) -> str:
            return f" ({item}){{0,{MAX_CALLS - 1}}}" if several else ""

        if not self.begin:
            # A text that begins like a call is one.
            start = "start: (call | TEXT)?\nTEXT: /[^\\s{](?s:.*)/" if free else "start: call"
            return "\n".join([start, *lines])
        marker = literal(self.begin.strip()) if marker_id is None else f"<[{marker_id}]>"
        after = self.begin.removeprefix(self.begin.strip())
        if self.is_list:
            list_of_calls = "call" + repeated('", " call')
            body, again = f'{literal(after + "[")} {list_of_calls} "]"', ""
        else:
            body, again = f"{literal(after)} call {literal(self.end)}", repeated(f'"\\n" {marker} body')
        lines.append(f"body: {body}")
        if not free:
            return "\n".join([f"start: {marker} body{again}", *lines])
        lines.append("TEXT: /(?s:.*)/")
        if marker_id is not None:
            return "\n".join([f"start: TEXT ({marker} body{again})?", *lines])
        lines.append(f"head[lazy]: TEXT {marker}")
        return "\n".join([f"start: TEXT | head body{again}", *lines])

    def parse(self, text: str) -> tuple[list[ToolCall], str]:
        """The calls in a whole answer, and the text around them."""
        parser = ToolCallParser(self)
        parts = [*parser.feed(text), *parser.finish()]
        calls = [part for part in parts if isinstance(part, ToolCall)]
        return calls, "".join(part for part in parts if isinstance(part, str))


HERMES = ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>", "arguments")
LLAMA = ToolFormat("llama", "", "", "parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS] ", "", "arguments", is_list=True)


def tool_format(chat_template: str | None) -> ToolFormat | None:
    """The format of the model with this chat template; None if it has no tools, or in an unknown format."""
    template = chat_template or ""
    if not re.search(r"\btools\b", template):
        return None
    if "<tool_call>" in template:
        # GLM and others write <arg_key> or <function=…> there, which is no JSON.
        return None if re.search(r"<arg_key>|<function=", template) else HERMES
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if re.search(r"""["']parameters["']\s*:""", template) and "<|eot_id|>" in template:
        return LLAMA
    return None


class ToolCallParser:
    """Tells calls from text while an answer is still coming. What could begin a call is held back."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self._format = tool_format
        self._marker = tool_format.begin.strip()
        self._end = tool_format.end.strip()
        self._buffer = ""
        self._begun = False  # text or a call has come
        self._in_call = False
        self._after_call = False
        self._space = ""  # between a text and the call behind it

    def feed(self, piece: str) -> list[str | ToolCall]:
        """What `piece` settles: text to show, and calls."""
        self._buffer += piece
        return list(self._settled(last=False))

    def finish(self) -> list[str | ToolCall]:
        """What is left at the end of the answer. A call that is not whole, or no call at all, is text."""
        return list(self._settled(last=True))

    def _settled(self, last: bool) -> Iterator[str | ToolCall]:
        progress = True
        while progress:
            if self._in_call:
                found, progress = self._take_calls(last)
                yield from found
            else:
                text, progress = self._take_text(last)
                if text:
                    yield text

    def _take_text(self, last: bool) -> tuple[str, bool]:
        """Text up to a call or what may be one, and whether a call begins behind it."""
        if self._marker:
            text, marker, rest = self._buffer.partition(self._marker)
            if marker:
                self._buffer, self._in_call = rest, True
                self._space = text[len(text.rstrip()) :]
                return self._shown(text.rstrip()), True
            held = 0 if last else _held_back(text, self._marker)
        else:
            text = self._buffer
            if not self._begun and text.lstrip().startswith("{"):
                self._in_call = True
                return "", True
            held = len(text) if not (last or self._begun or text.strip()) else 0
        self._buffer = text[len(text) - held :]
        return self._shown(text[: len(text) - held]), False

    def _shown(self, text: str) -> str:
        if self._after_call:
            text = text.lstrip()
        if text.strip():
            self._begun, self._after_call = True, False
        return text

    def _take_calls(self, last: bool) -> tuple[list[str | ToolCall], bool]:
        """The calls at the buffer's beginning, or its text if there are none, and whether more may follow."""
        stop = _json_end(self._buffer, "[" if self._format.is_list else "{")
        if stop is None and not last:
            return [], False
        calls = _calls(self._buffer[:stop], self._format) if stop else None
        rest = self._buffer[stop:].lstrip()
        if calls and not last and self._end.startswith(rest) and rest != self._end:
            return [], False
        self._in_call, self._begun, space, self._space = False, True, self._space, ""
        if not calls:
            text = space + self._marker + self._buffer[:stop]
            self._buffer = self._buffer[len(self._buffer[:stop]) :]
            return [text], bool(self._buffer)
        # A model may forget to close a call.
        self._buffer, self._after_call = rest.removeprefix(self._end), True
        return list(calls), True


def _json_end(text: str, opening: str) -> int | None:
    """Where the JSON value ends that `text` begins with: 0 if there is none, None if it is not whole yet."""
    begin = text.lstrip()
    if not begin.startswith(opening):
        return None if not begin else 0
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def _calls(text: str, tool_format: ToolFormat) -> list[ToolCall]:
    """The calls that the JSON value `text` stands for; none if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for each in value if tool_format.is_list else [value]:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            return []
        arguments = each.get("arguments", each.get("parameters"))
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(each["name"], arguments))
    return calls


def _held_back(text: str, marker: str) -> int:
    """Characters at the end of `text` that a call may begin with, or the space before one."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            text = text[:-length]
            break
    else:
        length = 0
    return length + len(text) - len(text.rstrip())


def _arguments_schema(tool: Tool) -> str:
    schema = dict(tool.parameters)
    if not schema["properties"]:
        schema.setdefault("additionalProperties", False)
    try:
        return lark_schema(schema)
    except InvalidSettingError as error:
        raise InvalidSettingError(f"tool {tool.name}: {error}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
