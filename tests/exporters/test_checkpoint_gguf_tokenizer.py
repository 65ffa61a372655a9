"""Tokenizer metadata of GGUF files → tokenizer.json: encoding, decoding, special tokens, damage."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.checkpoint.gguf_file import Metadata
from pocketlm_exporters.checkpoint.gguf_tokenizer import GgufTokenizer, read_tokenizer
from pocketlm_exporters.checkpoint.pre_tokenizers import PRE_TOKENIZERS, find_pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
AWKWARD = [
    "Why is the sky blue?",
    "  leading,   inner  and trailing  ",
    "\n\n\ttabs\t \r\n\x00\x7f",
    "日本語 한국어 العربية ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 ﬁ ½ ² ①",
    "\u200b\ufeff\U0010ffff",
    "1234567890 ١٢٣ 67.89e-10",
    "don't WE'LL it'S",
]


def read(values: Mapping[str, Any]) -> GgufTokenizer:
    """`values` without their "tokenizer.ggml."; lists of numbers as the container reads them."""
    metadata = {}
    for key, value in values.items():
        if isinstance(value, list) and not isinstance(value[0], str):
            value = np.array(value)
        metadata[key if "." in key else f"tokenizer.ggml.{key}"] = value
    return read_tokenizer(Metadata(metadata, "t.gguf"), "t.gguf")


def encode(tokenizer: GgufTokenizer, text: str) -> list[str]:
    return list(Tokenizer.from_str(tokenizer.json).encode(text, add_special_tokens=False).tokens)


def byte_level(merges: Sequence[str] = ("a b",), special: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    tokens = [*special, *BYTES, *(merge.replace(" ", "") for merge in merges)]
    types = [CONTROL] * len(special) + [NORMAL] * (len(tokens) - len(special))
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": list(merges),
        "token_type": types,
        **more,
    }


def pieces(pieces: Mapping[str, float], *, with_bytes: bool = True, **more: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: unknown, bytes, then pieces with their scores."""
    codes = [f"<0x{byte:02X}>" for byte in range(256)] if with_bytes else []
    tokens = ["<unk>", "<s>", "</s>", *codes, *pieces]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * (3 + len(codes)) + list(pieces.values()),
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * len(codes) + [NORMAL] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }


# ------------------------------------------------------------------ byte-level


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_every_pre_tokenizer(name: str, text: str) -> None:
    tokenizer = Tokenizer.from_str(read(byte_level(pre=name)).json)
    decoded = tokenizer.decode(tokenizer.encode(text).ids)
    if PRE_TOKENIZERS[name].nfc:
        text = text.replace("e\u0301", "é")
    assert decoded == text


WORDS = "I'll say 12345 a\tb  c\n\n don'T: été::\r\n  X1²"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", "I|'ll| say| 12345| a|\t|b| | c|\n\n| don|'|T|:| été|::|\r\n | X|1²"),
        ("smollm", "I|'ll| say| |1|2|3|4|5| a|\t|b| | c|\n\n| don|'|T|:| été|::|\r\n | X|1|²"),
        ("llama-bpe", "I|'ll| say| |123|45| a|\tb| | c|\n\n| don|'T|:| été|::\r\n| | X|1²"),
        ("qwen2", "I|'ll| say| |1|2|3|4|5| a|\tb| | c|\n\n| don|'T|:| été|::\r\n| | X|1|²"),
        ("tekken", "I|'ll| say| |1|2|3|4|5| a|\tb| | c|\n\n| don|'T|:| été|::\r\n| | X|1|²"),
        ("gpt-4o", "I'll| say| |123|45| a|\tb| | c|\n\n| don'T|:| été|::\r\n| | X|1²"),
        ("seed-coder", "I|'ll| say| |1|2|3|4|5| a|\tb| | c|\n\n| don|'T|:| été|::|\r\n| | X|1|²"),
        ("deepseek-coder", "I|'|ll| say| |1|2|3|4|5| a|\tb| | c|\n|\n| don|'|T|:| été|::|\r|\n| | X|1|²"),
        ("deepseek-llm", "I|'|ll| say| |1|2|3|4|5| a|\tb| | c|\n|\n| don|'|T|:| é|t|é|::|\r|\n| | X|1|²"),
        ("deepseek-v3", "I|'ll| say| |123|45| a|\tb| | c|\n\n| don|'T|:| été|::\r\n| | X|1²"),
        ("default", "I|'|ll| say| |123|45| a|\t|b| | c|\n\n| don|'|T|:| été|::|\r\n | X|1²"),
    ],
)
def test_where_words_are_cut(name: str, expected: str) -> None:
    cut = find_pre_tokenizer(name, "t.gguf").pre_tokenizer().pre_tokenize_str(WORDS)
    got = "|".join(WORDS[start:end] for _, (start, end) in cut)
    assert got == expected


def test_cased_words() -> None:
    def cut(name: str) -> list[str]:
        text = "HTMLParser iPhone ÀÉcole"
        spans = find_pre_tokenizer(name, "t.gguf").pre_tokenizer().pre_tokenize_str(text)
        return [text[start:end] for _, (start, end) in spans]

    assert cut("tekken") == ["HTMLParser", " i", "Phone", " ÀÉcole"]
    assert cut("llama-bpe") == ["HTMLParser", " iPhone", " ÀÉcole"]


def test_merges_apply_in_their_order() -> None:
    tokenizer = read(byte_level(["a b", "b c", "ab c"]))
    assert encode(tokenizer, "abc bc") == ["abc", "Ġ", "bc"]
    assert encode(read(byte_level(["b c", "a b", "a bc"])), "abc") == ["abc"]
    assert encode(read(byte_level(["b c", "a b"])), "abc") == ["a", "bc"]


def test_a_merge_whose_piece_begins_with_a_space() -> None:
    values = byte_level(["a b"])
    values = {**values, "tokens": [*values["tokens"], " ", " a"], "token_type": [*values["token_type"], 1, 1]}
    assert encode(read({**values, "merges": ["a b", "  a"]}), "ab") == ["ab"]


def test_a_whole_word_is_one_token_where_merges_are_ignored() -> None:
    values = byte_level(["a b"])
    values = {**values, "tokens": [*values["tokens"], "xyz"], "token_type": [*values["token_type"], NORMAL]}
    assert encode(read({**values, "pre": "llama-bpe"}), "xyz") == ["xyz"]
    assert encode(read({**values, "pre": "smaug-bpe"}), "xyz") == ["x", "y", "z"]


def test_text_is_composed_where_the_model_wants_it() -> None:
    composed = encode(read(byte_level(pre="qwen2")), "é")
    assert encode(read(byte_level(pre="qwen2")), "e\u0301") == composed
    assert encode(read(byte_level(pre="llama-bpe")), "e\u0301") != composed


def test_special_and_user_defined_tokens() -> None:
    values = byte_level(["a b"], ["<|im_start|>", "<|im_end|>"])
    values["tokens"] = [*values["tokens"], "<tool>", "[PAD300]"]
    values["token_type"] = [*values["token_type"], USER_DEFINED, UNUSED]
    tokenizer = Tokenizer.from_str(read(values).json)
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added == {"<|im_start|>": True, "<|im_end|>": True, "<tool>": False}
    ids = tokenizer.encode("<|im_start|>ab<tool><|im_end|>").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<|im_start|>", "ab", "<tool>", "<|im_end|>"]
    assert tokenizer.decode(ids) == "ab<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>ab<tool><|im_end|>"
    assert read(values).size == len(values["tokens"])


def test_files_without_token_types() -> None:
    values = byte_level(["a b"])
    del values["token_type"]
    assert encode(read(values), "ab") == ["ab"]


def test_empty_tokens_get_a_name_as_in_llama_cpp() -> None:
    values = byte_level(["a b"])
    values = {
        **values,
        "tokens": [*values["tokens"], "", ""],
        "token_type": [*values["token_type"], UNUSED, UNUSED],
    }
    size = len(values["tokens"])
    assert Tokenizer.from_str(read(values).json).id_to_token(size - 1) == f"[EMPTY_{size - 1}]"


# ------------------------------------------------------------------ bos, eos, chat


@pytest.mark.parametrize(
    ("pre", "said", "expected"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
    ],
)
def test_whether_text_begins_with_bos(pre: str, said: bool | None, expected: bool) -> None:
    values = byte_level(["a b"], ["$odd:name"], pre=pre, bos_token_id=0)
    result = read(values if said is None else {**values, "add_bos_token": said})
    assert result.tokens.bos == 0
    assert result.tokens.add_bos is expected
    tokenizer = Tokenizer.from_str(result.json)
    assert tokenizer.encode("ab").tokens == (["$odd:name", "ab"] if expected else ["ab"])
    assert tokenizer.encode("ab", "a").tokens == (
        ["$odd:name", "ab", "$odd:name", "a"] if expected else ["ab", "a"]
    )


def test_no_bos_is_never_added() -> None:
    tokens = read(byte_level(pre="llama-bpe", add_bos_token=True)).tokens
    assert (tokens.bos, tokens.add_bos, tokens.eos) == (None, False, ())


def test_answers_end_with_eos_eot_and_the_templates_end_of_turn() -> None:
    special = ["<|endoftext|>", "<|im_end|>", "<eot>", "<|eot_id|>", "<eom>"]
    values = byte_level(["a b"], special, eos_token_id=0, eot_token_id=2, eom_token_id=4)
    assert read(values).tokens.eos == (0, 2, 4)
    assert read({**values, "tokenizer.chat_template": ""}).chat_template is None
    template = "{{ messages }}<|im_end|><|end|>"
    result = read({**values, "tokenizer.chat_template": template})
    assert result.tokens.eos == (0, 2, 4, 1)  # <|end|> is no token here, <|eot_id|> not in the template
    assert result.chat_template == template


# ------------------------------------------------------------------ SentencePiece


def slow_sentencepiece(text: str, scores: Mapping[str, float]) -> list[str]:
    """Joins the best scored neighbours, the leftmost first, until none is a piece (llama.cpp's way)."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joints = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joints:
            return symbols
        i = min(joints)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


# No piece overlaps a copy of itself, where the order among equal scores would show.
SCORES = {piece: -float(i) for i, piece in enumerate(
    ["ab", "▁a", "bc", "abc", "▁ab", "cd", "bcd", "▁abcd", "da", "c▁", "▁", "a", "b", "c", "d"]
)}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text("abcd ", max_size=12))
def test_merges_derived_from_scores_encode_like_the_slow_reference(text: str) -> None:
    assert encode(_SENTENCEPIECE, text) == (slow_sentencepiece(text, SCORES) if text else [])


_SENTENCEPIECE = read(pieces(SCORES))


@pytest.mark.parametrize("text", AWKWARD)
def test_sentencepiece_falls_back_to_bytes_and_back(text: str) -> None:
    tokenizer = Tokenizer.from_str(_SENTENCEPIECE.json)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_adds_bos_and_a_space() -> None:
    tokenizer = Tokenizer.from_str(_SENTENCEPIECE.json)
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    assert encode(_SENTENCEPIECE, "a</s>a") == ["▁a", "</s>", "▁a"]
    assert encode(_SENTENCEPIECE, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert _SENTENCEPIECE.tokens.add_bos


def test_sentencepiece_without_a_space_before() -> None:
    result = read(pieces(SCORES, add_space_prefix=False, add_bos_token=False))
    tokenizer = Tokenizer.from_str(result.json)
    assert tokenizer.encode("ab ab").tokens == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode(" ab").ids) == " ab"


def test_sentencepiece_without_bytes_has_unknown_text() -> None:
    assert encode(read(pieces(SCORES, with_bytes=False)), "aéèa") == ["▁a", "<unk>", "a"]


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "kind 'bert'; pocketlm reads gpt2 and llama"),
        ({"pre": "smolm"}, r"pre-tokenizer 'smolm'.*Did you mean smollm.* Known are default, gpt-2,"),
    ],
)
def test_tokenizers_that_there_is_no_code_for(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read({**byte_level(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"says nothing about tokenizer\.ggml\.model"),
        ({"tokens": None}, r"has no tokenizer\.ggml\.tokens"),
        ({"tokens": "abc"}, "expected an array of strings"),
        ({"tokens": ["a", "a", "ab"], "token_type": [1, 1, 1]}, "has the token 'a' twice"),
        ({"token_type": [1, 2]}, r"has 2 tokenizer\.ggml\.token_type for 257 tokens"),
        ({"merges": None}, r"has no tokenizer\.ggml\.merges"),
        ({"merges": ["ab"]}, "the merge 'ab' does not join two tokens to a third"),
        ({"merges": ["a ☃"]}, "the merge 'a ☃' does not join"),
        ({"merges": ["b a"]}, "the merge 'b a' does not join"),
        ({"bos_token_id": 257}, "bos_token_id is 257, but there are 257 tokens"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected int"),
    ],
)
def test_damaged_byte_level_tokenizers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({**byte_level(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, r"has no tokenizer\.ggml\.scores"),
        ({"scores": [1.0]}, r"has 1 tokenizer\.ggml\.scores for"),
        ({"scores": [float("nan")] * 274}, "some that are no numbers"),
        ({"unknown_token_id": 999}, "unknown_token_id is 999"),
    ],
)
def test_damaged_sentencepiece_tokenizers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({**pieces(SCORES), **change})


def test_a_piece_of_absurd_length() -> None:
    with pytest.raises(CheckpointError, match="has a token of 1,001 characters, expected at most 1,000"):
        read(pieces({"a" * 1001: 0.0}))
