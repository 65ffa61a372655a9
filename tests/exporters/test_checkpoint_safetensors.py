"""Folders in Hugging Face's layout as checkpoints."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.checkpoints import (
    CONFIG,
    llama_tensors,
    safetensors_bytes,
    source,
    tiny_folder,
    tokenizer_json,
)
from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.checkpoint import Checkpoint, open_checkpoint, safetensors_folder, safetensors_weights

INDEX = "model.safetensors.index.json"
TENSORS = llama_tensors(CONFIG)


def opened(folder: Path, files: dict[str, Any] | None = None) -> Checkpoint:
    tiny_folder(folder, files)
    return open_checkpoint(source(folder))


def refused(
    folder: Path, files: dict[str, Any], message: str, kind: type[CheckpointError] = CheckpointError
) -> None:
    with pytest.raises(kind, match=message) as caught:
        opened(folder, files)
    assert caught.type in (kind, *kind.__subclasses__())


def shards() -> dict[str, Any]:
    """The tensors in two files, and their index."""
    names = sorted(TENSORS)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    files: dict[str, Any] = {
        file: safetensors_bytes({name: TENSORS[name] for name in half}) for file, half in halves.items()
    }
    weight_map = {name: file for file, half in halves.items() for name in half}
    return {**files, INDEX: {"weight_map": weight_map}, "model.safetensors": None}


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("type_", ["F32", "F16", "BF16", "F64"])
def test_weights_are_float32_whatever_they_are_stored_as(tmp_path: Path, type_: str) -> None:
    content = safetensors_bytes(TENSORS, dict.fromkeys(TENSORS, type_))
    checkpoint = opened(tmp_path / "m", {"model.safetensors": content})
    assert set(checkpoint.tensors) == set(TENSORS)
    tolerance = {"F16": 2e-3, "BF16": 1e-2}.get(type_, 0)
    for name, tensor in TENSORS.items():
        got = checkpoint.tensors[name]
        assert (got.dtype, got.shape) == (np.float32, tensor.shape)
        np.testing.assert_allclose(got, tensor, rtol=tolerance, atol=tolerance)
    assert checkpoint.source.format == f"{type_} × {len(TENSORS)}"


def test_bfloat16_is_exact(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.140625, 1e-30, 3.3895314e38] + [0.0] * 27, np.float32)
    content = safetensors_bytes({**TENSORS, "model.norm.weight": values}, {"model.norm.weight": "BF16"})
    got = opened(tmp_path / "m", {"model.safetensors": content}).tensors["model.norm.weight"]
    bits = np.round(values.view(np.uint32) / 65536).astype(np.uint32) << 16  # the upper half of a float32
    np.testing.assert_array_equal(got.view(np.uint32), bits)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", shards())
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(checkpoint.tensors[name], tensor)


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    files = {"model.safetensors": None, "weights.safetensors": safetensors_bytes(TENSORS)}
    assert len(opened(tmp_path / "m", files).tensors) == len(TENSORS)


def test_the_usual_name_is_taken_where_there_are_others(tmp_path: Path) -> None:
    files = {"adapter.safetensors": safetensors_bytes({"lora": TENSORS["model.norm.weight"]})}
    assert "lora" not in opened(tmp_path / "m", files).tensors


def test_another_architecture_is_opened_as_it_is(tmp_path: Path) -> None:
    content = safetensors_bytes({"anything.weight": TENSORS["model.norm.weight"]})
    config = {"model_type": "gpt_neox"}
    checkpoint = opened(tmp_path / "m", {"config.json": config, "model.safetensors": content})
    assert checkpoint.config == config
    assert list(checkpoint.tensors) == ["anything.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_reported_when_read(tmp_path: Path, value: float) -> None:
    norm = TENSORS["model.norm.weight"].copy()
    norm[7] = value
    content = safetensors_bytes({**TENSORS, "model.norm.weight": norm})
    checkpoint = opened(tmp_path / "m", {"model.safetensors": content})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity"):
        checkpoint.tensors["model.norm.weight"]


def test_weights_beyond_float32(tmp_path: Path) -> None:
    content = safetensors_bytes(
        {**TENSORS, "model.norm.weight": np.full(32, 1e300)},  # type: ignore[dict-item]
        {"model.norm.weight": "F64"},
    )
    checkpoint = opened(tmp_path / "m", {"model.safetensors": content})
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        checkpoint.tensors["model.norm.weight"]


def test_integers_are_no_weights_but_may_be_there(tmp_path: Path) -> None:
    extra = {**TENSORS, "model.positions": np.arange(4, dtype=np.float32)}
    checkpoint = opened(
        tmp_path / "m", {"model.safetensors": safetensors_bytes(extra, {"model.positions": "I8"})}
    )
    with pytest.raises(UnsupportedModelError, match=r"model\.positions is stored as I8, expected F32, F16"):
        checkpoint.tensors["model.positions"]
    content = safetensors_bytes(TENSORS, {"lm_head.weight": "I8"})
    refused(
        tmp_path / "m",
        {"model.safetensors": content},
        r"lm_head\.weight is stored as I8",
        UnsupportedModelError,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"no tensor model\.layers\.2\.input_layernorm\.weight, which a llama model",
        ),
        ({"num_hidden_layers": 10**9}, r"no tensor model\.layers\.2\.input_layernorm\.weight"),
        ({"hidden_size": 64}, r"embed_tokens\.weight has the shape \(16, 32\), expected \(16, 64\)"),
        ({"num_key_value_heads": None}, r"k_proj\.weight has the shape \(16, 32\), expected \(32, 32\)"),
        ({"hidden_size": "32"}, "hidden_size is '32' in the configuration, expected a positive integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights that are quantized already"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    refused(tmp_path / "m", {"config.json": {**CONFIG, **config}}, message)


def test_a_tied_head_may_be_absent(tmp_path: Path) -> None:
    headless = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    files: dict[str, Any] = {"model.safetensors": safetensors_bytes(headless)}
    refused(tmp_path / "m", files, r"has no tensor lm_head\.weight")
    files["config.json"] = {**CONFIG, "tie_word_embeddings": True}
    assert "lm_head.weight" not in opened(tmp_path / "m", files).tensors


# ------------------------------------------------------------------ damage


SOUND = safetensors_bytes(TENSORS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        SOUND[:7],
        SOUND[:50],
        SOUND[:-1],
        b"\xff" * 8 + SOUND[8:],
        SOUND[:8] + b"!" + SOUND[9:],
        SOUND + b"x",
    ],
    ids=["empty", "length", "header", "data", "huge", "json", "more"],
)
def test_damaged_weights(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "m", {"model.safetensors": content}, r"model\.safetensors cannot be read: ")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    refused(tmp_path / "m", {"model.safetensors": None}, "has no .*safetensors files")
    two: dict[str, Any] = {"model.safetensors": None, "a.safetensors": SOUND, "b.safetensors": SOUND}
    refused(tmp_path / "m", two, r"has 2 safetensors files .* and no model\.safetensors\.index\.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    files: dict[str, Any] = {"model.safetensors": None, name: b"\x80\x02}q\x00."}
    refused(tmp_path / "m", files, f"Python pickle .{name}.*which can run any code", UnsupportedModelError)


def test_an_index_that_does_not_fit_its_files(tmp_path: Path) -> None:
    files = shards()
    refused(
        tmp_path / "a",
        {**files, "model-2.safetensors": None},
        r"has no model-2\.safetensors, which model\.saf",
    )
    swapped = dict.fromkeys(TENSORS, "model-1.safetensors")
    refused(tmp_path / "b", {**files, INDEX: {"weight_map": swapped}}, "says that model-1.* holds the tensor")
    partial = {name: file for name, file in files[INDEX]["weight_map"].items() if "norm" not in name}
    refused(tmp_path / "c", {**files, INDEX: {"weight_map": partial}}, r"has no tensor model\.norm\.weight")


@pytest.mark.parametrize(
    "index",
    ["", "[]", "null", "{", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}',
     b"\xff", "[" * 99999],
    ids=range(10),
)  # fmt: skip
def test_damaged_indexes(tmp_path: Path, index: str | bytes) -> None:
    refused(tmp_path / "m", {**shards(), INDEX: index}, "is not an index with a weight_map")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "C:x.safetensors",
     "a\0.safetensors", "model.bin", "", ".."],
)  # fmt: skip
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(SOUND)
    index = {"weight_map": {"lm_head.weight": name}}
    refused(tmp_path / "m", {INDEX: index}, "a plain name of a safetensors file is expected")


def test_an_index_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_weights, "_MAX_INDEX_BYTES", 10)
    refused(tmp_path / "m", shards(), "is not an index .* it has more than 0 MiB")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_json(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "m", {name: "{"}, f"{name} is not valid JSON")
    refused(tmp_path / "m", {name: "[" * 99999}, f"{name} is not valid JSON")
    refused(tmp_path / "m", {name: "[]"}, f"{name} holds a list, expected an object")
    refused(tmp_path / "m", {name: b"\xff"}, f"{name} cannot be read: it is not UTF-8 text")


def test_texts_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_folder, "_MAX_TEXT_BYTES", 10)
    refused(tmp_path / "m", {}, "has more than 0 MiB")


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    refused(tmp_path / "m", {"config.json": None}, r"has no config\.json; it is no checkpoint folder")
    refused(
        tmp_path / "n", {"tokenizer.json": None}, r"has no tokenizer\.json\. Write it with transformers: Auto"
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizers(tmp_path: Path, text: str) -> None:
    refused(tmp_path / "m", {"tokenizer.json": text}, r"tokenizer\.json is damaged: ")


def test_failed_assertions_of_the_library_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        @staticmethod
        def from_str(text: str) -> None:
            raise PanicException("index out of range\nin some line")

    monkeypatch.setattr("pocketlm_exporters.checkpoint.vocabulary.Tokenizer", Panicking)
    refused(tmp_path / "m", {}, r"tokenizer\.json is damaged: index out of range\. Fetch")

    class Interrupted(Panicking):
        @staticmethod
        def from_str(text: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("pocketlm_exporters.checkpoint.vocabulary.Tokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(source(tmp_path / "m"))


# ------------------------------------------------------------------ tokenizer and chat


def test_the_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    assert opened(tmp_path / "m").tokenizer_json == tokenizer_json()


def test_added_tokens_without_an_embedding_are_left_out(tmp_path: Path) -> None:
    files = {"tokenizer.json": tokenizer_json(added=["<s>", "[PAD]"])}
    checkpoint = opened(tmp_path / "m", files)
    contents = [token["content"] for token in json.loads(checkpoint.tokenizer_json)["added_tokens"]]
    assert contents == ["<s>"]
    config = {**CONFIG, "vocab_size": 17}
    files["config.json"] = {**config, "model_type": "other"}  # type: ignore[assignment]
    assert "[PAD]" in opened(tmp_path / "m", files).tokenizer_json


def test_a_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    config = {**CONFIG, "vocab_size": 9, "model_type": "other"}
    files = {"config.json": config, "tokenizer.json": tokenizer_json(added=[])}
    refused(tmp_path / "m", files, "a token with the id 15, but there are embeddings for 9 tokens only")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config.json": {"chat_template": "one"}, "chat_template.jinja": "file"}, "file"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "tools"},
                        {"name": "default", "template": "usual"},
                    ]
                }
            },
            "usual",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "x"}]}}, None),
    ],
)
def test_chat_templates(tmp_path: Path, files: dict[str, Any], expected: str | None) -> None:
    assert opened(tmp_path / "m", files).chat_template == expected


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    for value, kind in ((7, "int"), ([{"name": "default"}, {"name": "default", "template": {}}], "dict")):
        settings = {"tokenizer_config.json": {"chat_template": value}}
        refused(tmp_path / "m", settings, f"chat_template is a {kind}, expected text")
    refused(tmp_path / "m", {"tokenizer_config.json": '{"chat_template": "\\ud800"}'}, "in valid Unicode")


@pytest.mark.parametrize(
    ("config", "generation", "settings", "template", "expected"),
    [
        ({}, None, {}, None, (None, ())),
        ({"bos_token_id": 1, "eos_token_id": 2}, None, {}, None, (1, (2,))),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [2, 15]}, {}, None, (1, (2, 15))),
        ({"eos_token_id": 3}, {"bos_token_id": 1, "eos_token_id": 2}, {}, None, (1, (2,))),
        ({}, None, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, None, (1, (2,))),
        ({"eos_token_id": 2}, None, {"eos_token": "<|im_end|>"}, None, (None, (2, 15))),
        ({"eos_token_id": 2}, None, {"eos_token": "unheard of"}, None, (None, (2,))),
        ({"eos_token_id": 2}, None, {"eos_token": "\ud800"}, None, (None, (2,))),
        ({"eos_token_id": 2}, None, {"eos_token": {"lstrip": False}}, None, (None, (2,))),
        ({"eos_token_id": 2}, None, {}, "{{ x }}<|im_end|><|eot_id|>", (None, (2, 15))),
        ({"eos_token_id": 2}, None, {}, "{{ x }}</s>", (None, (2,))),
    ],
)
def test_where_answers_end(
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    settings: dict[str, Any],
    template: str | None,
    expected: tuple[int | None, tuple[int, ...]],
) -> None:
    files = {
        "config.json": {**CONFIG, **config},
        "generation_config.json": generation,
        "tokenizer_config.json": settings,
        "chat_template.jinja": template,
    }
    tokens = opened(tmp_path / "m", files).tokens
    assert (tokens.bos, tokens.eos) == expected


@pytest.mark.parametrize("value", [-1, 16, "2", True, [2, None], 2.0, 2**70, {}])
def test_ids_that_no_token_has(tmp_path: Path, value: Any) -> None:
    refused(tmp_path / "m", {"config.json": {**CONFIG, "eos_token_id": value}}, "expected the id of a token")


@pytest.mark.parametrize(
    ("post_processor", "settings", "expected"),
    [
        (None, {}, False),
        (None, {"add_bos_token": True}, False),  # as transformers' other fast tokenizers: the file decides
        ("<s>", {}, True),
        ("</s>", {}, False),
        ("<s>", {"add_bos_token": False}, True),
        ("<s>", {"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}, False),
        (None, {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}, True),
        ("<s>", {"add_bos_token": None, "tokenizer_class": "LlamaTokenizer"}, True),
    ],
)
def test_whether_text_begins_with_bos(
    tmp_path: Path, post_processor: str | None, settings: dict[str, Any], expected: bool
) -> None:
    files = {"tokenizer.json": tokenizer_json(bos=post_processor), "tokenizer_config.json": settings}
    assert opened(tmp_path / "m", files).tokens.add_bos is expected


def test_a_tokenizer_that_cannot_encode(tmp_path: Path) -> None:
    words = {**json.loads(tokenizer_json(added=["<s>"])), "pre_tokenizer": None}
    words["model"] = {"type": "WordLevel", "vocab": {"x": 0, "<s>": 1}, "unk_token": "missing"}
    files = {"tokenizer.json": words, "config.json": {**CONFIG, "bos_token_id": 1}}
    refused(tmp_path / "m", files, r"tokenizer\.json is damaged: WordLevel error: Missing \[UNK\]")


def test_without_a_bos_none_is_added(tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "tokenizer.json": tokenizer_json(bos="<s>")}
    assert opened(tmp_path / "m", files).tokens.add_bos is False


# ------------------------------------------------------------------ source


def test_the_record_of_the_source(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_folder(folder, {"README.md": "not read", "generation_config.json": {}})
    heard = []
    checkpoint = open_checkpoint(source(folder, licence="MIT"), progress=lambda *report: heard.append(report))
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    record = checkpoint.source
    assert record.sha256 == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert (record.kind, record.location, record.revision) == ("safetensors", "tests/tiny", "r1")
    assert (checkpoint.name, checkpoint.licence) == ("tiny", "MIT")
    assert {task for task, *_ in heard} == {f"Checking {name}" for name in names}
