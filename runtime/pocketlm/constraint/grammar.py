"""What an answer may be, in any of the forms that users write it in."""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pocketlm.constraint.json_schema import Schema, checked, locate
from pocketlm.constraint.lark_tokens import parts_of_tokens
from pocketlm.errors import InvalidSettingError, MissingExtraError

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

MAX_DEFINITIONS = 1000  # llguidance follows them by recursion
MAX_CHARACTERS = 1 << 14  # of a regex or a Lark grammar: the cost of a regex can grow with its square
MAX_TOKEN_PARTS = 5000  # of all tokens of a Lark grammar, written out
MAX_CHOICES = 1000  # of a choice; a parser's row holds 2,000 items

# One line, spaced as json.dumps and the chat templates' tojson do, which is what models have read most of.
_JSON_STYLE: dict[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_DEFINITION = re.compile(r"^[ \t]*[?!]?[A-Za-z_]", re.MULTILINE)
_EMBEDDED = re.compile(r"%json\s*(?=\{)")
_STACK_BYTES = 64 << 20
_stack_lock = threading.Lock()


@dataclass(frozen=True)
class Grammar:
    """A checked grammar, of no particular model. It can be shared between requests, models and threads.

    Build one by a class method; each raises InvalidSettingError, which says what is wrong and where, and
    MissingExtraError without llguidance.
    """

    kind: str  # the setting that it came from: json_schema, regex, grammar or choice
    source: str  # in llguidance's own form

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that follows `schema` (draft 2020-12), which is an object or JSON text.

        A keyword that cannot be kept is refused. Properties come in the schema's order, on one line, with a
        space behind each comma and colon.
        """
        ready = checked(schema)
        source = _json_source(ready)
        problem = _problem(source)
        if problem is not None:
            place = locate(ready, problem, lambda part: _problem(_json_source(part)))
            raise InvalidSettingError(f"json_schema at {place}: {problem}")
        return cls("json_schema", source)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches `pattern` as a whole.

        The syntax is https://docs.rs/regex's: no look-around, no back references.
        """
        _check_text("regex", pattern)
        return cls._of("regex", load_llguidance().LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text that follows a Lark grammar, as far as llguidance knows them.

        https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md says how far, and how to embed a
        JSON schema (`%json {…}`).
        """
        text, own = _with_checked_schemas(text)
        _check_text("grammar", own)
        definitions = len(_DEFINITION.findall(own))
        if definitions > MAX_DEFINITIONS:
            raise InvalidSettingError(
                f"grammar has {definitions:,} definitions, at most {MAX_DEFINITIONS:,} are possible."
            )
        if parts_of_tokens(own) > MAX_TOKEN_PARTS:
            raise InvalidSettingError(
                f"grammar has tokens of more than {MAX_TOKEN_PARTS:,} parts, when those that they are made "
                "of are written out. Make rules of some: names of rules are in small letters."
            )
        return cls.lark_text("grammar", text)

    @classmethod
    def lark_text(cls, kind: str, text: str) -> Grammar:
        """A Lark grammar whose embedded schemas come from `lark_schema`."""
        return cls._of(kind, load_llguidance().LLMatcher.grammar_from_lark(text))

    @classmethod
    def choice(cls, options: Sequence[str]) -> Grammar:
        """Exactly one of `options`."""
        if isinstance(options, str) or not options or not all(isinstance(each, str) for each in options):
            raise InvalidSettingError(f"choice is {options!r}, expected a list of texts.")
        if len(options) > MAX_CHOICES:
            raise InvalidSettingError(
                f"choice has {len(options):,} options, at most {MAX_CHOICES:,} are possible."
            )
        _check_text("choice", "".join(options))
        return cls.lark_text("choice", "start: " + " | ".join(map(literal, options)))

    @classmethod
    def _of(cls, kind: str, source: str) -> Grammar:
        problem = _problem(source)
        if problem is not None:
            raise InvalidSettingError(f"{kind} is refused: {problem}")
        return cls(kind, source)


def load_llguidance() -> Any:
    """The module. Raises MissingExtraError."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise MissingExtraError("structured output", "structured") from None


def limits() -> llguidance.LLParserLimits:
    """What compiling and each step may cost: a second and some MB, then an error."""
    return cast("llguidance.LLParserLimits", load_llguidance().LLParserLimits(verbose_errors=False))


def on_deep_stack(function: Callable[[], T]) -> T:
    """Calls `function` where its recursion finds room.

    llguidance follows references by recursion, and a stack that overflows ends the process: a thread's
    default holds some hundred levels.
    """
    results: list[T] = []
    with _stack_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=lambda: results.append(function()), name="pocketlm-grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return results[0]


def literal(text: str) -> str:
    """`text` as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def lark_schema(schema: Mapping[str, Any] | bool | str) -> str:
    """A checked JSON schema as a Lark grammar embeds it. Raises InvalidSettingError."""
    ready = checked(schema)
    return f"%json {json.dumps(_styled(ready))}"


def _styled(schema: Schema) -> dict[str, Any]:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return {**schema, "x-guidance": _JSON_STYLE}


def _json_source(schema: Schema) -> str:
    source: str = load_llguidance().LLMatcher.grammar_from_json_schema(json.dumps(_styled(schema)))
    return source


def _problem(source: str) -> str | None:
    """What llguidance has against a grammar."""
    matcher = load_llguidance().LLMatcher
    is_error, messages = on_deep_stack(
        lambda: matcher.validate_grammar_with_warnings(source, limits=limits())
    )
    return str(messages[0]).strip() if is_error else None


def _with_checked_schemas(text: str) -> tuple[str, str]:
    """`text` with its embedded schemas checked as if each had come alone, and without them."""
    whole, own, end = [], [], 0
    for match in _EMBEDDED.finditer(text) if isinstance(text, str) else ():
        if match.start() < end:
            continue  # within a schema
        try:
            schema, stop = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue  # llguidance says in which line
        own.append(text[end : match.start()])
        whole += [own[-1], lark_schema(schema)]
        end = stop
    if not whole:
        return text, text
    return "".join([*whole, text[end:]]), "".join([*own, text[end:]])


def _check_text(kind: str, text: str) -> None:
    if not isinstance(text, str):
        raise InvalidSettingError(f"{kind} is {text!r}, expected text.")
    if len(text) > MAX_CHARACTERS:
        raise InvalidSettingError(
            f"{kind} has {len(text):,} characters, at most {MAX_CHARACTERS:,} are possible."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidSettingError(
            f"{kind} has a lone surrogate at position {error.start}. Only well-formed unicode is possible."
        ) from None
