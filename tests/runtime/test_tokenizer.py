from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pocketlm.errors import BundleError, InvalidSettingError, PromptError, UnsupportedModelError
from pocketlm.manifest import Tokens
from pocketlm.tokenizer import Message, TextStream, Tokenizer

# Emoji, accents and Thai, so that merges cut characters apart in many ways.
CORPUS = [
    "the cat sat on the mat",
    "naïve café, déjà vu",
    "👩‍👩‍👧 🙂🙃🙂 🇩🇪",
    "ภาษาไทย ไทย",
    "  two  spaces\n\n",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> tokenizers.Tokenizer:
    """Like GPT-2's: bytes as printable characters, merged within words."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Like Llama 2's: ▁ for spaces and one in front, bytes for characters that have no token."""
    merges = [("▁", "▁"), ("h", "e"), ("▁", "he"), ("l", "l"), ("▁he", "ll"), ("▁hell", "o"), ("é", "é")]
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdehlorstw.é\ufffd", *("".join(merge) for merge in merges)]
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


LIBRARY = {"byte_level": byte_level(), "sentencepiece_like": sentencepiece_like()}
IDS = {kind: {token: library.token_to_id(token) for token in SPECIAL} for kind, library in LIBRARY.items()}
CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]

kinds = pytest.mark.parametrize("kind", list(LIBRARY))
properties = settings(deadline=None, max_examples=100)
texts = st.text() | st.text("he llo▁é🙂👩‍👧ไ\ufffd\n", max_size=20)


def load(
    kind: str = "byte_level", template: str | None = CHATML, *, bos: bool = True, add_bos: bool = False
) -> Tokenizer:
    ids = IDS[kind]
    tokens = Tokens(bos=ids["<s>"] if bos else None, eos=(ids["</s>"],), add_bos=add_bos)
    return Tokenizer(LIBRARY[kind].to_str(), template, tokens)


TOKENIZERS = {kind: load(kind) for kind in LIBRARY}
id_lists = st.lists(st.integers(0, max(t.vocabulary_size for t in TOKENIZERS.values()) + 2), max_size=30)


def pieces(stream: TextStream, ids: Iterable[int]) -> list[str]:
    return [*(stream.push(id_) for id_ in ids), stream.flush()]


@kinds
@given(text=texts)
@properties
def test_text_comes_back(kind: str, text: str) -> None:
    ids = TOKENIZERS[kind].encode(text)
    # ▁ is how such a tokenizer writes a space.
    same = text.replace("▁", " ") if kind == "sentencepiece_like" else text
    assert TOKENIZERS[kind].decode(ids) == same == LIBRARY[kind].decode(ids)
    assert ids == LIBRARY[kind].encode(text, add_special_tokens=False).ids


@kinds
@given(text=texts)
@properties
def test_a_stream_gives_each_character_once_it_is_complete(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    stream, so_far = tokenizer.stream(), ""
    for count, id_ in enumerate(ids, start=1):
        so_far += stream.push(id_)
        complete = b"".join(map(tokenizer.token_bytes, ids[:count])).decode("utf-8", "ignore")
        assert so_far == (complete.removeprefix(" ") if kind == "sentencepiece_like" else complete)
    assert stream.flush() == ""
    assert so_far.count("\ufffd") == text.count("\ufffd")


@kinds
@given(ids=id_lists, skip_special=st.booleans())
@properties
def test_a_streams_pieces_make_the_decoded_text(kind: str, ids: list[int], skip_special: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    decoded = tokenizer.decode(ids, skip_special=skip_special)
    assert "".join(pieces(tokenizer.stream(skip_special=skip_special), ids)) == decoded
    library = LIBRARY[kind].decode(ids, skip_special_tokens=skip_special)
    # In a run of byte tokens with one ill-formed part, the library gives up the sound characters as well.
    if kind == "byte_level" or "\ufffd" not in library:
        assert decoded == library


@given(ids=id_lists)
@properties
def test_ill_formed_bytes_decode_as_unicode_recommends(ids: list[int]) -> None:
    library = LIBRARY["sentencepiece_like"]
    raw = b""
    for token in (library.id_to_token(id_) for id_ in ids):
        if token is not None and token not in SPECIAL:
            raw += bytes.fromhex(token[3:5]) if token.startswith("<0x") else token.replace("▁", " ").encode()
    assert TOKENIZERS["sentencepiece_like"].decode(ids) == raw.decode("utf-8", "replace").removeprefix(" ")


@kinds
def test_half_a_character_waits_for_the_rest(kind: str) -> None:
    ids = ids_of_bytes(kind, "🙂".encode())
    assert pieces(TOKENIZERS[kind].stream(), ids) == ["", "", "", "🙂", ""]
    assert pieces(TOKENIZERS[kind].stream(), ids[:3]) == ["", "", "", "\ufffd"]


@kinds
def test_ill_formed_bytes_hold_nothing_up(kind: str) -> None:
    ids = ids_of_bytes(kind, b"\xff\xe2\x82a\xf0\xe2\x82\xac")
    expected = ["\ufffd", "", "", "\ufffda", "", "\ufffd", "", "€", ""]
    assert pieces(TOKENIZERS[kind].stream(), ids) == expected


@kinds
def test_a_special_token_does_not_part_a_character(kind: str) -> None:
    first, *rest = ids_of_bytes(kind, "é".encode())
    special = IDS[kind]["<|im_end|>"]
    assert TOKENIZERS[kind].decode([first, special, *rest]) == "é"
    assert TOKENIZERS[kind].decode([first, special, *rest], skip_special=False) == "\ufffd<|im_end|>\ufffd"


def ids_of_bytes(kind: str, raw: bytes) -> list[int]:
    if kind == "sentencepiece_like":
        return [LIBRARY[kind].token_to_id(f"<0x{byte:02X}>") for byte in raw]
    by_bytes = {TOKENIZERS[kind].token_bytes(id_): id_ for id_ in range(TOKENIZERS[kind].vocabulary_size)}
    return [by_bytes[bytes([byte])] for byte in raw]


def test_only_the_first_space_of_a_text_is_taken_away() -> None:
    tokenizer = TOKENIZERS["sentencepiece_like"]
    ids = tokenizer.encode("hello  hello")
    assert tokenizer.decode(ids) == "hello  hello"
    assert pieces(tokenizer.stream(), [ids[0], *ids[0:1]]) == ["hello", " hello", ""]
    assert tokenizer.decode(tokenizer.encode("   hello")) == "   hello"
    assert tokenizer.decode(ids_of_bytes("sentencepiece_like", b"  a")) == " a"
    # Behind other tokens it is theirs.
    assert "".join(pieces(tokenizer.stream(continues=True), ids)) == " hello  hello"
    # Nothing that is skipped counts as a beginning; what is shown does.
    bos = IDS["sentencepiece_like"]["<s>"]
    assert tokenizer.decode([bos, *ids]) == "hello  hello"
    assert tokenizer.decode([bos, *ids], skip_special=False) == "<s> hello  hello"


@kinds
def test_ids_without_a_token_have_no_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([-1, tokenizer.vocabulary_size, *ids, 1 << 40]) == "hello"


@kinds
def test_vocabulary_size_counts_added_tokens(kind: str) -> None:
    library = tokenizers.Tokenizer.from_str(LIBRARY[kind].to_str())
    library.add_tokens(["one more"])
    tokens = Tokens(bos=None, eos=(), add_bos=False)
    assert Tokenizer(library.to_str(), None, tokens).vocabulary_size == TOKENIZERS[kind].vocabulary_size + 1


def test_added_tokens_of_a_byte_level_tokenizer_are_plain_text() -> None:
    library = byte_level()
    library.add_tokens(["¡olé!", "an added token"])
    tokenizer = Tokenizer(library.to_str(), None, Tokens(bos=None, eos=(), add_bos=False))
    ids = tokenizer.encode("¡olé! an added token.")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "¡olé! an added token."


def test_a_token_outside_the_alphabet_of_bytes_is_plain_text() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a b": 0, "<unk>": 1}, unk_token="<unk>"))
    library.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(library.to_str(), None, Tokens(bos=None, eos=(), add_bos=False))
    assert tokenizer.decode([0]) == "a b" == library.decode([0])


@pytest.mark.parametrize(("scheme", "text"), [("always", "hello hello"), ("never", " hello hello")])
def test_metaspace_decodes_like_sentencepiece(scheme: str, text: str) -> None:
    library = sentencepiece_like()
    library.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = Tokenizer(library.to_str(), None, Tokens(bos=None, eos=(), add_bos=False))
    ids = [library.token_to_id("▁hello")] * 2
    assert tokenizer.decode(ids) == text == library.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("▁+"), " "), decoders.Fuse()]),
    ],
)
def test_refuses_to_decode_what_cannot_be_streamed(decoder: Any) -> None:
    library = sentencepiece_like()
    if decoder is not None:
        library.decoder = decoder
    data = json.loads(library.to_str())
    if decoder is None:
        data["decoder"] = None
    tokenizer = Tokenizer(json.dumps(data), None, Tokens(bos=None, eos=(), add_bos=False))
    ids = tokenizer.encode("hello")  # Encoding needs no decoder.
    with pytest.raises(UnsupportedModelError, match=r"decodes with .* no code"):
        tokenizer.decode(ids)


@kinds
def test_special_tokens_are_recognised_and_none_are_added(kind: str) -> None:
    library = tokenizers.Tokenizer.from_str(LIBRARY[kind].to_str())
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, IDS[kind][name]) for name in ("<s>", "</s>")]
    )
    tokenizer = Tokenizer(library.to_str(), None, Tokens(bos=IDS[kind]["<s>"], eos=(), add_bos=False))
    ids = tokenizer.encode("<|im_start|>hello</s>")
    assert ids[0] == IDS[kind]["<|im_start|>"]
    assert ids[-1] == IDS[kind]["</s>"]
    assert IDS[kind]["<s>"] not in ids


@kinds
def test_bos_goes_in_front_as_the_model_or_the_caller_wants(kind: str) -> None:
    bos, without = IDS[kind]["<s>"], load(kind).encode("hello")
    assert load(kind, add_bos=True).encode("hello") == [bos, *without]
    assert load(kind, add_bos=True).encode("hello", add_bos=False) == without
    assert load(kind).encode("hello", add_bos=True) == [bos, *without]
    assert load(kind, add_bos=True).encode("") == [bos]


def test_never_cuts_or_pads_a_prompt() -> None:
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=400)
    tokenizer = Tokenizer(library.to_str(), None, Tokens(bos=None, eos=(), add_bos=False))
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat" * 9)) == "the cat sat on the mat" * 9
    assert len(tokenizer.encode("the cat")) < 9


def test_refuses_bos_from_a_model_without() -> None:
    with pytest.raises(InvalidSettingError, match="no begin-of-text token"):
        load(bos=False).encode("hello", add_bos=True)


def test_refuses_text_that_is_no_unicode() -> None:
    with pytest.raises(PromptError, match=r"lone surrogate, '\\ud83d', at position 3"):
        load().encode("abc\ud83d")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": 1}'])
def test_refuses_what_is_no_tokenizer(text: str) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(text, None, Tokens(bos=None, eos=(), add_bos=False))


@pytest.mark.parametrize("tokens", [Tokens(9999, (), False), Tokens(None, (0, 9999), False)])
def test_refuses_special_ids_that_the_tokenizer_lacks(tokens: Tokens) -> None:
    with pytest.raises(BundleError, match="special token id 9999"):
        Tokenizer(LIBRARY["byte_level"].to_str(), None, tokens)


def test_renders_a_conversation() -> None:
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert load().render_chat(HELLO) == turns + "<|im_start|>assistant\n"
    assert load().render_chat(HELLO, add_generation_prompt=False) == turns


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}", "<s>|</s>|"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ('{{ {"b": "<é>", "a": [1]} | tojson }}', '{"b": "<é>", "a": [1]}'),
        ('{{ {"a": 1} | tojson(indent=1) }}', '{\n "a": 1\n}'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% generation %}{% set x = 1 %}{{ messages[1].content }}{% endgeneration %}{{ x }}", "Hello"),
        ("  {% if true %}\n  yes\n  {% endif %}\n", "  yes\n"),
        ("{{ '<b>' }}\n\n", "<b>\n"),
        ("{{ messages[0]['content'].split(' ')[0] | upper }}", "BE"),
    ],
)
def test_templates_see_what_hugging_face_gives_them(template: str, text: str) -> None:
    assert load(template=template).render_chat(HELLO) == text


def test_a_model_without_special_tokens_leaves_them_undefined() -> None:
    library = LIBRARY["byte_level"].to_str()
    template = "{{ bos_token is defined }} {{ eos_token is defined }}"
    assert Tokenizer(library, template, Tokens(None, (), False)).render_chat(HELLO) == "False False"


def test_templates_know_the_date() -> None:
    before = datetime.now().strftime("%d %b %Y")
    text = load(template="{{ strftime_now('%d %b %Y') }}").render_chat(HELLO)
    assert text in {before, datetime.now().strftime("%d %b %Y")}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "failed on these messages: roles must alternate"),
        ("{% if %}", "failed on these messages: Expected an expression"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('') }}", "failed on these messages: TemplateError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_failing_template_is_the_prompts_error(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load(template=template).render_chat(HELLO)


def test_an_endless_template_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.tokenizer.MAX_PROMPT_CHARACTERS", 5000)
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }},{% endfor %}{% endfor %}"
    with pytest.raises(PromptError, match="more than 5,000 characters"):
        load(template=template).render_chat(HELLO)


def test_refuses_to_render_without_a_template() -> None:
    assert load().has_chat_template
    tokenizer = load(template=None)
    assert not tokenizer.has_chat_template
    with pytest.raises(PromptError, match="no chat template"):
        tokenizer.render_chat(HELLO)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "a"}, {"role": "user", "content": 1}, "a"])
def test_refuses_messages_without_role_and_content(message: Any) -> None:
    with pytest.raises(PromptError, match="message 1 is"):
        load().render_chat([HELLO[1], message])


@kinds
@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_chat_has_at_most_one_bos(kind: str, template: str, add_bos: bool) -> None:
    tokenizer = load(kind, template, add_bos=add_bos)
    ids = tokenizer.encode_chat(HELLO)
    wanted = add_bos or template != CHATML
    assert ids.count(IDS[kind]["<s>"]) == wanted
    assert (ids[0] == IDS[kind]["<s>"]) == wanted
    assert ids[wanted:] == load(kind).encode_chat(HELLO)
    assert len(tokenizer.encode_chat(HELLO, add_generation_prompt=False)) < len(ids)
