from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers

from helpers.awkward_schemas import REFUSED, SCHEMAS, record
from helpers.tiny import END_OF_TEXT, IM_END, IM_START, VOCABULARY, tokenizer_json
from pocketlm.constraint import Constraint, ConstraintError, ConstraintFactory, Grammar
from pocketlm.constraint.lark_tokens import parts_of_tokens
from pocketlm.errors import InvalidSettingError, MissingExtraError
from pocketlm.manifest import Tokens
from pocketlm.tokenizer import Tokenizer

WIDTH = VOCABULARY + 9  # models pad their vocabulary
EOS = (END_OF_TEXT, IM_END)
TOKENIZER = Tokenizer(tokenizer_json(), None, Tokens(bos=None, eos=EOS, add_bos=False))
FACTORY = ConstraintFactory(TOKENIZER, WIDTH, EOS)
PERSON = record(name={"type": "string"}, age={"type": "integer"})

properties = settings(deadline=None, max_examples=8)


def allowed(constraint: Constraint) -> list[int]:
    logits: NDArray[np.float32] = np.zeros(WIDTH, np.float32)
    constraint.mask(logits)
    kept = np.isfinite(logits)
    assert not logits[kept].any()
    return list(map(int, np.flatnonzero(kept)))


def advanced(constraint: Constraint, text: str) -> Constraint:
    """Behind `text`, each token of which has to be allowed."""
    for token_id in TOKENIZER.encode(text):
        assert token_id in allowed(constraint), TOKENIZER.decode([token_id])
        constraint.accept(token_id)
    return constraint


def accepts(grammar: Grammar, text: str) -> bool:
    constraint = FACTORY.constraint(grammar)
    for token_id in TOKENIZER.encode(text):
        if token_id not in allowed(constraint):
            return False
        constraint.accept(token_id)
    return constraint.complete


# What closes something, likeliest first. An e-mail address needs the @ before it can end.
CLOSING = [TOKENIZER.encode(text)[0] for text in ('"', "@", "}", "]", ":", ",", "n", " ", "0")]


def towards_the_end(tokens: Sequence[int], chance: random.Random) -> int:
    closing = [token_id for token_id in CLOSING if token_id in tokens]
    return closing[0] if closing else chance.choice(tokens)


def answer(grammar: Grammar, seed: int, budget: int = 40, limit: int = 2000) -> str:
    """A random answer, which heads for its end after `budget` tokens."""
    chance = random.Random(seed)
    constraint = FACTORY.constraint(grammar)
    ids: list[int] = []
    while len(ids) < limit:
        tokens = allowed(constraint)
        assert tokens
        assert constraint.complete == bool(set(EOS) & set(tokens))
        ends = constraint.complete and (constraint.must_stop or len(ids) >= budget or chance.random() < 0.1)
        if ends:
            return TOKENIZER.decode(ids)
        tokens = [token_id for token_id in tokens if token_id not in EOS]
        forced = constraint.forced()
        assert forced[:1] in ([], tokens)
        ids.append(chance.choice(tokens) if len(ids) < budget else towards_the_end(tokens, chance))
        constraint.accept(ids[-1])
    raise AssertionError(f"no end after {limit} tokens: {TOKENIZER.decode(ids)[:500]}")


def is_date(value: object) -> bool:
    date.fromisoformat(str(value))
    return True


CHECKER = jsonschema.FormatChecker(["uuid", "email", "ipv4", "ipv6"])
CHECKER.checks("date", raises=ValueError)(is_date)


@pytest.mark.parametrize("name", SCHEMAS)
@properties
@given(seed=st.integers(0, 1 << 32))
def test_what_is_complete_is_valid(name: str, seed: int) -> None:
    text = answer(Grammar.json_schema(SCHEMAS[name]), seed)
    validator = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=CHECKER)
    validator.validate(json.loads(text))
    text.encode()  # no lone surrogates either
    assert "\n" not in text


@pytest.mark.parametrize(("schema", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_kept_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InvalidSettingError, match="json_schema") as caught:
        Grammar.json_schema(schema)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_keywords_that_ask_for_nothing_are_no_hindrance() -> None:
    grammar = Grammar.json_schema({"type": "array", "uniqueItems": False, "maxItems": 1, "nullable": False})
    assert accepts(grammar, "[1]")


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)])
def test_a_schema_comes_as_an_object_or_as_text(schema: Any) -> None:
    grammar = Grammar.json_schema(schema)
    assert accepts(grammar, '{"name": "Zoë \\n", "age": -3}')
    assert not accepts(grammar, '{"name":"Zoë","age":3}')  # spaced as json.dumps does
    assert not accepts(grammar, '{"age": 3, "name": "Zoë"}')
    assert not accepts(grammar, '{"name": "Zoë", "age": 3')


def test_named_properties_are_all_unless_the_schema_says_so() -> None:
    assert not accepts(Grammar.json_schema(PERSON), '{"name": "a", "age": 3, "x": 1}')
    assert accepts(
        Grammar.json_schema({**PERSON, "additionalProperties": True}), '{"name": "a", "age": 3, "x": 1}'
    )
    # Merged objects name properties for each other.
    merged = {"allOf": [PERSON, record(x={"type": "integer"})]}
    assert accepts(Grammar.json_schema(merged), '{"name": "a", "age": 3, "x": 1}')


@pytest.mark.parametrize(
    ("day", "exists"),
    [
        ("2024-02-29", True),
        ("2000-02-29", True),
        ("1900-02-29", False),
        ("2023-02-29", False),
        ("2023-02-28", True),
        ("2023-04-31", False),
        ("2023-12-31", True),
        ("0000-01-01", False),
        ("0004-02-29", True),
        ("2023-13-01", False),
    ],
)
def test_dates_are_the_calendars(day: str, exists: bool) -> None:
    assert accepts(Grammar.json_schema({"type": "string", "format": "date"}), f'"{day}"') is exists
    moment = Grammar.json_schema({"type": "string", "format": "date-time"})
    assert accepts(moment, f'"{day}T23:59:59.5+01:00"') is exists
    assert not accepts(moment, f'"{day}T23:59:60Z"')


def test_any_object() -> None:
    grammar = Grammar.json_object()
    assert accepts(grammar, '{"a": [1, {"b": null}], "c": "d"}')
    assert not accepts(grammar, "[]")


def test_a_regex_matches_the_whole_text() -> None:
    grammar = Grammar.regex(r"[a-f]{2,3}-\d+|naïve")
    assert accepts(grammar, "abc-12")
    assert accepts(grammar, "naïve")
    assert not accepts(grammar, "abc-")
    assert not accepts(grammar, "xab-1")


def test_lark() -> None:
    grammar = Grammar.lark('start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/')
    assert accepts(grammar, "1+22+333")
    assert not accepts(grammar, "1+")


def test_a_schema_within_lark_is_kept_as_one_alone() -> None:
    schema = json.dumps({"type": "string", "format": "date"})
    grammar = Grammar.lark(f'start: "on " day\nday: %json {schema}')
    assert accepts(grammar, 'on "2024-02-29"')
    assert not accepts(grammar, 'on "2023-02-29"')
    with pytest.raises(InvalidSettingError, match="#: uniqueItems is not supported"):
        Grammar.lark('start: %json {"uniqueItems": true}')
    with pytest.raises(InvalidSettingError, match="grammar is refused"):
        Grammar.lark('start: %json {"type": }')


def test_special_tokens_in_lark() -> None:
    grammar = Grammar.lark('start: "a" <|im_start|> "b"')
    constraint = advanced(FACTORY.constraint(grammar), "a")
    assert allowed(constraint) == [IM_START]
    with pytest.raises(InvalidSettingError, match=r"grammar does not work with this model.*nope"):
        FACTORY.constraint(Grammar.lark("start: <|nope|>"))


def test_text_never_holds_special_tokens() -> None:
    constraint = advanced(FACTORY.constraint(Grammar.regex(r"(?s:.*)")), "<|im_")
    assert constraint.complete
    tokens = allowed(constraint)
    assert IM_START not in tokens
    assert set(EOS) <= set(tokens)
    assert max(tokens) < VOCABULARY


def test_choice() -> None:
    options = ["yes", "no", 'sa"y', "naïve\n", "yesterday"]
    grammar = Grammar.choice(options)
    assert all(accepts(grammar, each) for each in options)
    assert not accepts(grammar, "ye")
    constraint = advanced(FACTORY.constraint(grammar), "yes")
    assert constraint.complete
    assert not constraint.must_stop


@pytest.mark.parametrize("options", [[], "yes", ["a", 3], ["a"] * 1001, ["\ud800"]])
def test_no_choice(options: Any) -> None:
    with pytest.raises(InvalidSettingError, match="choice"):
        Grammar.choice(options)


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (Grammar.regex, "a{2", "unclosed counted repetition"),
        (Grammar.regex, "(?=a)b", "look-around"),
        (Grammar.regex, "\ud800", "lone surrogate at position 0"),
        (Grammar.regex, "(" * 5000 + "a" + ")" * 5000, "regex is refused"),
        (Grammar.regex, "a" * 20_000, "20,000 characters, at most"),
        (Grammar.regex, 3, "expected text"),
        (Grammar.lark, 3, "expected text"),
        (Grammar.lark, "", "Empty grammar"),
        (Grammar.lark, "start: other", 'unknown name: "other"'),
        (Grammar.lark, 'a: "b"', "no start rule"),
        (Grammar.lark, "start: " + "(" * 100_000, "characters, at most"),
        (Grammar.lark, "start: " + "(" * 5000 + '"a"' + ")" * 5000, "too deeply nested"),
        (Grammar.lark, "start: a\n" * 1001, "1,001 definitions, at most 1,000"),
        (
            Grammar.lark,
            "start: A\n" + "\n".join(f"{chr(65 + n)}: {chr(66 + n)}" * 2 for n in range(9)),
            "refused",
        ),
    ],
)
def test_broken_grammars(make: Any, text: Any, message: str) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        make(text)
    assert message in str(caught.value)


def test_a_doubling_terminal_ends_in_an_error() -> None:
    rules = "\n".join(f"R{n}: R{n + 1} R{n + 1}" for n in range(40))
    with pytest.raises(InvalidSettingError, match="tokens of more than 5,000 parts"):
        Grammar.lark(f'start: R0\n{rules}\nR40: "a"')


def test_parts_of_tokens() -> None:
    text = 'start: A\nA: B B\nB: "C D" /A B/ // A A\n  | C # D\nC: "x"i'
    assert parts_of_tokens(text) == len("ABCBC") + len("BC") + len("C")
    assert parts_of_tokens('start: A\nA: B "x"\nB: A') == 0  # llguidance says where the circle is


def test_a_doubling_rule_ends_in_an_error() -> None:
    rules = "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(40))
    constraint = FACTORY.constraint(Grammar.lark(f'start: r0\n{rules}\nr40: "a"'))
    with pytest.raises(ConstraintError, match=r"cannot go on under its grammar: .*Too many items"):
        for _ in range(50):
            constraint.mask(np.zeros(WIDTH, np.float32))
            constraint.accept(TOKENIZER.encode("a")[0])


@pytest.mark.parametrize("schema", [{"items": {}, "minItems": 10**9}, {"type": "string", "minLength": 10**9}])
def test_huge_counts_cost_nothing(schema: dict[str, Any]) -> None:
    constraint = FACTORY.constraint(Grammar.json_schema({"type": "array", **schema}))
    assert allowed(constraint)
    assert not constraint.complete


@pytest.mark.parametrize("key", ["allOf", "anyOf", "items"])
def test_long_chains_of_references_find_room(key: str) -> None:
    """Of the length that is allowed: a stack that is too small would end the process."""
    count = 499
    definitions: dict[str, Any] = {}
    for index in range(count):
        link = {"$ref": f"#/$defs/d{index + 1}"}
        definitions[f"d{index}"] = {key: link if key == "items" else [link]}
    definitions[f"d{count}"] = {"const": 1} if key != "items" else {}
    del definitions["d0"]
    grammar = Grammar.json_schema({"$ref": "#/$defs/d1", "$defs": definitions})
    assert allowed(FACTORY.constraint(grammar))


def test_long_chains_of_rules_find_room() -> None:
    rules = "\n".join(f"r{index}: r{index + 1}" for index in range(998))
    assert accepts(Grammar.lark(f'start: r0\n{rules}\nr998: "a"'), "a")


def test_the_end_is_allowed_only_where_the_answer_is_complete() -> None:
    constraint = FACTORY.constraint(Grammar.json_schema(PERSON))
    for token_id in TOKENIZER.encode('{"name": "a", "age": 3}'):
        assert not set(EOS) & set(allowed(constraint))
        assert not constraint.complete
        assert not constraint.must_stop
        constraint.accept(token_id)
    assert allowed(constraint) == sorted(EOS)
    assert constraint.complete
    assert constraint.must_stop
    assert constraint.forced() == []
    constraint.accept(IM_END)
    assert constraint.must_stop


def test_masked_logits_keep_their_values() -> None:
    constraint = FACTORY.constraint(Grammar.choice(["a", "b"]))
    logits = np.arange(WIDTH, dtype=np.float32)
    constraint.mask(logits)
    kept = np.flatnonzero(np.isfinite(logits))
    assert [TOKENIZER.decode([int(each)]) for each in kept] == ["a", "b"]
    np.testing.assert_array_equal(logits[kept], kept)
    with pytest.raises(InvalidSettingError, match=r"shape \(2, 3\)"):
        constraint.mask(np.zeros((2, 3), np.float32))


def test_a_row_of_a_larger_array_is_masked_in_place() -> None:
    rows = np.zeros((3, WIDTH), np.float32)
    FACTORY.constraint(Grammar.choice(["a"])).mask(rows[1])
    assert np.isfinite(rows).sum(axis=1).tolist() == [WIDTH, 1, WIDTH]


def test_forced_tokens_lead_on() -> None:
    constraint = FACTORY.constraint(Grammar.json_schema(PERSON))
    forced = constraint.forced()
    assert '{"name": "'.startswith(TOKENIZER.decode(forced))
    assert len(forced) > 3
    for token_id in forced:
        assert allowed(constraint) == [token_id]
        constraint.accept(token_id)


@pytest.mark.parametrize("text", ["<|im_end|> x", "naïve 🙂", " the the"])
def test_forced_text_is_spelled_in_plain_tokens(text: str) -> None:
    constraint = FACTORY.constraint(Grammar.json_schema({"const": text}))
    ids = []
    while not constraint.must_stop:
        (token_id,) = allowed(constraint)
        ids.append(token_id)
        constraint.accept(token_id)
    assert TOKENIZER.decode(ids) == json.dumps(text, ensure_ascii=False)
    assert not set(ids) & TOKENIZER.special_ids


def test_a_forbidden_token() -> None:
    constraint = FACTORY.constraint(Grammar.choice(["a"]))
    with pytest.raises(ConstraintError, match="cannot go on"):
        constraint.accept(TOKENIZER.encode("b")[0])
    for use in (constraint.forced, lambda: constraint.complete, lambda: constraint.must_stop):
        with pytest.raises(ConstraintError):
            use()


def test_forks_go_their_own_ways() -> None:
    first = advanced(FACTORY.constraint(Grammar.json_schema(PERSON)), '{"name": "a')
    second = first.fork()
    advanced(first, '", "age": 1}')
    assert first.must_stop
    assert not second.complete
    assert advanced(second, 'b", "age": 22}').must_stop


def test_a_grammar_is_compiled_once_and_each_answer_begins_anew() -> None:
    factory = ConstraintFactory(TOKENIZER, WIDTH, EOS)
    schemas = [{"const": index} for index in range(20)]  # more than are kept
    for _ in range(2):
        for index, schema in enumerate(schemas):
            constraint = factory.constraint(Grammar.json_schema(schema))
            assert advanced(constraint, str(index)).must_stop
    grammar = Grammar.json_schema(schemas[0])
    advanced(factory.constraint(grammar), "0")
    assert not factory.constraint(grammar).complete


def test_a_model_that_cannot_end() -> None:
    with pytest.raises(InvalidSettingError, match=r"the ids \[9999\] end an answer"):
        ConstraintFactory(TOKENIZER, WIDTH, [9999])


def test_a_vocabulary_smaller_than_the_tokenizers() -> None:
    constraint = ConstraintFactory(TOKENIZER, END_OF_TEXT + 1, [END_OF_TEXT]).constraint(Grammar.regex("a*"))
    logits = np.zeros(END_OF_TEXT + 1, np.float32)
    constraint.mask(logits)
    assert np.isfinite(logits[END_OF_TEXT])


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r'pip install "pocketlm\[structured\]"'):
        Grammar.regex("a")


def sentencepiece_like() -> Tokenizer:
    """Like Llama 2's: ▁ for spaces and one in front of each text, bytes for what has no token."""
    merges = [("l", "l"), ("h", "e"), ("he", "ll"), ("▁", "w")]
    tokens = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *'▁helow"', *map("".join, merges)]
    library = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, merges, byte_fallback=True)
    )
    library.add_special_tokens(["</s>"])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(library.to_str(), None, Tokens(bos=None, eos=(0,), add_bos=False))


def test_a_tokenizer_that_puts_a_space_in_front() -> None:
    tokenizer = sentencepiece_like()
    factory = ConstraintFactory(tokenizer, tokenizer.vocabulary_size, [0])
    constraint = factory.constraint(Grammar.json_schema({"const": "hello w\u00e9</s>"}))
    ids = []
    while not constraint.must_stop:
        ids.append(constraint.forced()[0])
        constraint.accept(ids[-1])
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    assert b"".join(pieces) == '"hello wé</s>"'.encode()
    assert b"hell" in pieces
    assert b" w" in pieces
    assert 0 not in ids
