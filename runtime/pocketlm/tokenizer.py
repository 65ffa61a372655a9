"""Text to token ids and back, and conversations to prompts.

Encoding is the `tokenizers` library's. Decoding is done here, token by token, as text has to come out
while it is being generated: each token is a few bytes, and a UTF-8 decoder holds back the beginning of a
character until the rest has come. (The library's own incremental decoder gives up on ill-formed UTF-8, and
decodes a window of tokens again and again.) `decode` is by construction what a stream yields in pieces.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, TypedDict

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from pocketlm.errors import BundleError, InvalidSettingError, PromptError, UnsupportedModelError
from pocketlm.manifest import Tokens

MAX_PROMPT_CHARACTERS = 1 << 26  # No context holds so much: a template that goes on is endless.

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Message(TypedDict):
    """One message of a conversation. Roles are the chat template's: mostly system, user, assistant."""

    role: str
    content: str


class ToolMessage(Message, total=False):
    """A message of a conversation with tools, in the form of the OpenAI API."""

    tool_calls: Sequence[Mapping[str, Any]]  # what an assistant's message calls
    tool_call_id: str  # the call that a tool's message answers
    name: str  # that tool


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, tokenizer_json: str, chat_template: str | None, tokens: Tokens) -> None:
        """`tokenizer_json` is the text of a Hugging Face `tokenizer.json`, `chat_template` jinja2 source.

        Raises BundleError if the former is no tokenizer, or has no such ids as `tokens` names.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # The library raises no narrower type.
            raise BundleError(
                f"tokenizer.json cannot be read: {error}. Export or pull the model again."
            ) from error
        # What suits training batches would cut a prompt silently here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokens = tokens
        self._template_source = chat_template
        self._added: dict[int, str] = {}
        self._special: set[int] = set()
        for token_id, added in self._tokenizer.get_added_tokens_decoder().items():
            self._added[token_id] = added.content
            if added.special:
                self._special.add(token_id)
        for token_id in (*([] if tokens.bos is None else [tokens.bos]), *tokens.eos):
            if self._token(token_id) is None:
                raise BundleError(
                    f"the manifest names the special token id {token_id}, but tokenizer.json has no such id. "
                    "Export or pull the model again."
                )

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included. The logits may be wider: some models pad theirs."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the added tokens that are no text, such as the beginning of a message."""
        return frozenset(self._special)

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """The token ids of `text`, in which special tokens are recognised.

        `add_bos` says whether the model's begin-of-text token goes in front; None does as the model was
        trained. Nothing else is added.

        Raises PromptError if `text` is no well-formed unicode, and InvalidSettingError if `add_bos` is asked
        of a model that has no such token.
        """
        bos = self._tokens.bos
        if add_bos and bos is None:
            raise InvalidSettingError(
                "add_bos is True, but the model has no begin-of-text token. Leave it out."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text has a lone surrogate, {error.object[error.start]!r}, at position {error.start}; "
                "only well-formed unicode can be encoded. Remove it, or read the text as UTF-8."
            ) from None
        # Of the library's calls only those for several texts leave the interpreter to other threads.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        add_bos = self._tokens.add_bos if add_bos is None else add_bos
        return [bos, *ids] if add_bos and bos is not None else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; ids without a token have none.

        Bytes that are no UTF-8 become U+FFFD, one for each maximal ill-formed part, as the Unicode standard
        recommends (section 3.9).
        """
        stream = self.stream(skip_special=skip_special)
        pieces = [stream.push(token_id) for token_id in ids]
        return "".join(pieces) + stream.flush()

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> TextStream:
        """A decoder that takes tokens one at a time.

        Some tokenizers put a space before each text, which their decoder takes away again. `continues` is
        for tokens that follow others: a first space is theirs and stays.

        Raises UnsupportedModelError if pocketlm has no code for the tokenizer's decoder.
        """
        spaces = "" if continues else self._decoder.leading
        skipped = self._special if skip_special else set()
        return TextStream(lambda id_: b"" if id_ in skipped else self.token_bytes(id_), spaces)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for inside a text: any bytes, so perhaps only a part of a character."""
        token = self._token(token_id)
        if token is None:
            return b""
        if self._decoder.byte_level and token_id in self._added:
            return token.encode()  # Added tokens are plain text, not in the alphabet of bytes.
        return self._decoder.to_bytes(token)

    @property
    def has_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        return re.search(r"\btools\b", self._template_source or "") is not None

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt that the chat template makes of a conversation.

        `tools` are functions in the form of the OpenAI API. `add_generation_prompt` ends the prompt with the
        beginning of the assistant's answer.

        Raises PromptError if there is no template, if it fails or refuses the conversation, if a message
        lacks its role or content, or if there are tools that the template does not show.
        """
        if self._template_source is None:
            raise PromptError("the model has no chat template. Pass plain text instead (--raw).")
        if tools and not self.has_tools:
            raise PromptError(
                "the model's chat template has no tools: the model would never see them. Use a model that "
                "was trained to call tools, or describe them in a message and constrain the answer."
            )
        context: dict[str, Any] = {
            "messages": [_checked(message, index) for index, message in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if self._tokens.bos is not None:
            context["bos_token"] = self._token(self._tokens.bos)
        if self._tokens.eos:
            context["eos_token"] = self._token(self._tokens.eos[0])
        try:
            return _joined(self._template.generate(context))
        except PromptError:
            raise
        except Exception as error:  # A template is a program of others: it can fail in any way.
            raise PromptError(
                f"the chat template failed on these messages: {str(error) or type(error).__name__}"
            ) from error

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The token ids of `render_chat`, with exactly one begin-of-text token if the model wants one.

        Raises what `render_chat` and `encode` raise.
        """
        text = self.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        ids = self.encode(text, add_bos=False)
        bos = self._tokens.bos
        if bos is None or not self._tokens.add_bos or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def _token(self, token_id: int) -> str | None:
        if not 0 <= token_id < 1 << 32:
            return None
        token: str | None = self._tokenizer.id_to_token(int(token_id))
        return token

    @cached_property
    def _decoder(self) -> _Decoder:
        decoder = self._tokenizer.decoder
        return _read_decoder(None if decoder is None else json.loads(decoder.__getstate__()))

    @cached_property
    def _template(self) -> jinja2.Template:
        """Raises jinja2.TemplateSyntaxError."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
        return environment.from_string(self._template_source or "")


class TextStream:
    """Decodes tokens as they come, and never gives away a part of a character."""

    def __init__(self, token_bytes: Callable[[int], bytes], leading: str) -> None:
        """`leading` is taken away from the beginning of the text, as far as the text begins with it."""
        self._token_bytes = token_bytes
        self._leading = leading
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; mostly its own text, sometimes none."""
        return self._begun(self._utf8.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """What is held back when there are no more tokens: U+FFFD for half a character, or nothing."""
        return self._begun(self._utf8.decode(b"", final=True))

    def _begun(self, text: str) -> str:
        while self._leading and text:
            if text[0] != self._leading[0]:
                self._leading = ""
                break
            text, self._leading = text[1:], self._leading[1:]
        return text


@dataclass(frozen=True)
class _Decoder:
    """What the decoder of a tokenizer.json does, token by token."""

    byte_level: bool  # each character of a token stands for one byte (GPT-2)
    byte_fallback: bool  # tokens such as <0x0A> stand for one byte (sentencepiece)
    replacements: tuple[tuple[str, str], ...]
    leading: str  # what the text loses at its beginning, character by character

    def to_bytes(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def _read_decoder(spec: Mapping[str, Any] | None) -> _Decoder:
    """The `decoder` of a tokenizer.json. Raises UnsupportedModelError for what cannot go token by token."""
    byte_level = byte_fallback = fused = False
    replacements: list[tuple[str, str]] = []
    leading = ""
    for step in _steps(spec):
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old), **options}:
                replacements.append((old, " "))
                leading = "" if options.get("prepend_scheme") == "never" else " "
            # Only a fused text has one beginning; before that, each token would be stripped.
            case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0} if fused:
                leading = content * start
            case _:
                raise UnsupportedModelError(
                    f"tokenizer.json decodes with {json.dumps(step)}, for which pocketlm has no code. It "
                    "supports ByteLevel, ByteFallback, Metaspace, Replace of a string, Fuse, and after that "
                    "Strip at the beginning. Use a model whose tokenizer decodes with these."
                )
    return _Decoder(byte_level, byte_fallback, tuple(replacements), leading)


def _steps(spec: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any] | None]:
    if spec is not None and spec.get("type") == "Sequence":
        for step in spec["decoders"]:
            yield from _steps(step)
    else:
        yield spec


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable bytes are themselves, the others follow from U+0100 on (`bytes_to_unicode` in GPT-2's
    encoder.py, https://github.com/openai/gpt-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _checked(message: Message, index: int) -> dict[str, Any]:
    fields: dict[str, Any] = dict(message) if isinstance(message, Mapping) else {}
    calls = fields.get("tool_calls")
    if calls and fields.get("content") is None:
        fields["content"] = ""
    for name in ("role", "content"):
        if not isinstance(fields.get(name), str):
            raise PromptError(
                f'message {index} is {message!r}, expected {{"role": "…", "content": "…"}}, both strings.'
            )
    if calls:
        fields["tool_calls"] = [_checked_call(call, index) for call in calls]
    return fields


def _checked_call(call: Any, index: int) -> dict[str, Any]:
    """A call with its arguments as an object, as templates want them; the OpenAI API has them as text."""
    try:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
        if isinstance(function["name"], str) and isinstance(function["arguments"], dict):
            return {**call, "type": "function", "function": function}
    except (TypeError, KeyError, ValueError):
        pass
    raise PromptError(
        f'message {index} has the tool call {call!r}, expected {{"type": "function", "function": '
        '{"name": "…", "arguments": {…}}}, the arguments as an object or as its JSON text.'
    )


def _joined(pieces: Iterator[str]) -> str:
    parts, characters = [], 0
    for piece in pieces:
        parts.append(piece)
        characters += len(piece)
        if characters > MAX_PROMPT_CHARACTERS:
            raise PromptError(
                f"the chat template has written more than {MAX_PROMPT_CHARACTERS:,} characters and goes on. "
                "Shorten the messages, or pass plain text (--raw) if they are short: the template is faulty."
            )
    return "".join(parts)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for those who train; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like jinja2's own, but without its escapes for HTML. Templates rely on the parameters' order."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
