"""Damaged, incomplete and foreign GGUF files: each a CheckpointError that says what is wrong."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from helpers.checkpoints import (
    CONFIG,
    llama_metadata,
    llama_tensors,
    raw_gguf,
    source,
    stored_tensors,
    text_bytes,
    tiny_gguf,
    write_gguf,
)
from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.checkpoint import gguf_file, open_checkpoint
from pocketlm_exporters.checkpoint.gguf_file import GgufFile, Metadata

HUGE = 2**63 - 1
ARCHITECTURE = text_bytes("general.architecture") + struct.pack("<I", 8) + text_bytes("llama")


def number(key: str, code: int, data: bytes) -> bytes:
    return text_bytes(key) + struct.pack("<I", code) + data


def array(key: str, code: int, count: int, data: bytes = b"") -> bytes:
    return text_bytes(key) + struct.pack("<IIQ", 9, code, count) + data


def refused(
    tmp_path: Path, content: bytes, message: str, kind: type[CheckpointError] = CheckpointError
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        GgufFile(path)
    assert caught.type is kind
    assert "damaged.gguf" in str(caught.value)


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path, b"", "is empty")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        GgufFile(tmp_path / "nothing.gguf")


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for size in (3, 4, 7, 23, 24, 40, 500, 1500, len(content) // 2, len(content) - 33):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"truncated|is not a GGUF file"):
            GgufFile(tmp_path / "cut.gguf")


def test_a_wrong_beginning(tmp_path: Path) -> None:
    refused(tmp_path, raw_gguf(magic=b"GGML"), "is not a GGUF file: it begins with b'GGML'")
    big_endian = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    refused(tmp_path, big_endian, "is a big-endian GGUF file")
    refused(
        tmp_path, raw_gguf(version=1), "has GGUF version 1.*Convert the model again", UnsupportedModelError
    )
    refused(tmp_path, raw_gguf(version=4), "has GGUF version 4.*Upgrade pocketlm", UnsupportedModelError)


@pytest.mark.parametrize(
    "content",
    [
        raw_gguf(pair_count=HUGE),
        raw_gguf(tensor_count=HUGE),
        raw_gguf([text_bytes("k")[:4] + struct.pack("<I", 2**31)]),
        raw_gguf([array("k", 4, HUGE)]),
        raw_gguf([array("k", 8, HUGE)]),
        raw_gguf([array("k", 9, HUGE)]),
        raw_gguf([struct.pack("<Q", HUGE) + b"k"]),
    ],
    ids=["pairs", "tensors", "text", "numbers", "texts", "arrays", "key"],
)
def test_counts_beyond_the_file(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, content, r"is truncated: its header wants [\d,]+ bytes")


def test_a_header_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_MAX_HEADER_BYTES", 100)
    refused(tmp_path, raw_gguf([array("k", 0, 200, bytes(200))]), "is damaged: its header wants 200 bytes")


def test_metadata_that_makes_no_sense(tmp_path: Path) -> None:
    refused(tmp_path, raw_gguf([ARCHITECTURE, ARCHITECTURE]), "has the key general.architecture twice")
    refused(tmp_path, raw_gguf([number("k", 99, b"")]), "metadata value of unknown type 99")
    refused(tmp_path, raw_gguf([array("k", 99, 1)]), "metadata value of unknown type 99")
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(9))
    refused(tmp_path, raw_gguf([text_bytes("k") + struct.pack("<I", 9) + nested]), "unknown type 9")
    latin = text_bytes("k") + struct.pack("<I", 8) + text_bytes("ü".encode("latin-1"))
    refused(tmp_path, raw_gguf([latin]), "not UTF-8")
    for alignment in (0, 3):
        pair = number("general.alignment", 4, struct.pack("<I", alignment))
        refused(tmp_path, raw_gguf([pair]), f"general.alignment is {alignment}, expected a power of two")


def test_every_kind_of_number_is_read(tmp_path: Path) -> None:
    values = {0: ("B", 200), 1: ("b", -3), 2: ("H", 60000), 3: ("h", -4), 4: ("I", 2**31), 5: ("i", -5)}
    values |= {6: ("f", 0.5), 7: ("?", True), 10: ("Q", 2**63), 11: ("q", -6), 12: ("d", 0.25)}  # type: ignore[dict-item]
    pairs = [
        number(str(code), code, struct.pack(f"<{form}", value)) for code, (form, value) in values.items()
    ]
    pairs += [
        array(f"a{code}", code, 1, struct.pack(f"<{form}", value)) for code, (form, value) in values.items()
    ]
    nested = array("nested", 9, 1, struct.pack("<IQ", 8, 1) + text_bytes("deep"))
    (tmp_path / "numbers.gguf").write_bytes(raw_gguf([*pairs, nested]))
    metadata = GgufFile(tmp_path / "numbers.gguf").metadata
    for code, (_, value) in values.items():
        read = metadata.values[str(code)]
        assert (read, type(read)) == (value, type(value))
        numbers = metadata.numbers(f"a{code}")
        assert numbers is not None
        assert numbers.tolist() == [value]
    assert metadata.values["nested"] == [["deep"]]


def test_values_of_an_unexpected_type() -> None:
    metadata = Metadata({"text": "x", "flag": True, "list": ["a"], "long": "x" * 200}, "m.gguf")
    with pytest.raises(CheckpointError, match=r"m\.gguf: text is 'x', expected int"):
        metadata.get("text", int)
    with pytest.raises(CheckpointError, match="flag is True, expected int"):
        metadata.get("flag", int)
    with pytest.raises(CheckpointError, match="list is an array, expected an array of numbers"):
        metadata.numbers("list")
    with pytest.raises(CheckpointError, match="text is 'x', expected an array of strings"):
        metadata.texts("text")
    with pytest.raises(CheckpointError, match="says nothing about absent"):
        metadata.require("absent", str)
    with pytest.raises(CheckpointError, match=r"long is 'x{98}…, expected int"):
        metadata.get("long", int)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (("w", [32], 0, 2**40), "the tensor w ends at byte .* but the file has .* bytes"),
        (("w", [HUGE, HUGE], 0, 0), "the tensor w ends at byte"),
        (("w", [32, 2**60], 8, 0), "the tensor w ends at byte"),
        (("w", [32, 0], 0, 0), r"the shape \(0, 32\)"),
        (("w", [], 0, 0), r"the shape \(\)"),
        (("w", [33], 8, 0), "expected rows of whole Q8_0 blocks of 32"),
        (("w", [1, 1, 1, 1, 1], 0, 0), "has 5 dimensions, expected at most 4"),
        (("w", [1] * 5 + [HUGE] * 2000, 0, 0), "has 2005 dimensions"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, tensor: Any, message: str) -> None:
    refused(tmp_path, raw_gguf(tensors=[tensor], data=bytes(128)), message)


def test_tensors_of_unreadable_types(tmp_path: Path) -> None:
    unknown = raw_gguf(tensors=[("w", [32], 9999, 0)], data=bytes(128))
    refused(tmp_path, unknown, "type 9999, which the installed gguf library", UnsupportedModelError)
    integers = raw_gguf(tensors=[("w", [32], int(Q.I8), 0)], data=bytes(128))
    refused(tmp_path, integers, "I8 tensors, which the gguf library cannot dequantize", UnsupportedModelError)
    twice = raw_gguf(tensors=[("w", [1], 0, 0), ("w", [1], 0, 0)], data=bytes(128))
    refused(tmp_path, twice, "has the tensor w twice")


def test_scales_that_overflow_are_reported_as_damage(tmp_path: Path) -> None:
    config = {**CONFIG, "hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    stored = stored_tensors(config, llama_tensors(config))
    path = write_gguf(tmp_path / "q.gguf", llama_metadata(config), stored, {"blk.0.attn_v.weight": Q.Q8_0})
    entry = GgufFile(path).entries["blk.0.attn_v.weight"]
    content = bytearray(path.read_bytes())
    content[entry.start : entry.start + 2] = b"\xff\x7b"  # the largest finite half …
    content[entry.start + 34 : entry.start + 36] = b"\x00\x7e"  # … and a NaN
    path.write_bytes(content)
    checkpoint = open_checkpoint(source(path))
    with pytest.raises(CheckpointError, match=r"v_proj\.weight holds NaN or infinity"):
        checkpoint.tensors["model.layers.0.self_attn.v_proj.weight"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen3"}, "architecture 'qwen3'. From GGUF files pocketlm reads: llama"),
        ({"general.type": "adapter"}, "a GGUF of type 'adapter', expected 'model'"),
        ({"split.count": 3}, "one of 3 parts of a split model"),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8"),
        ({"llama.attention.causal": False}, r"llama\.attention\.causal = False"),
        ({"llama.logit_scale": 0.5}, r"llama\.logit_scale = 0\.5, which pocketlm has no code for"),
        ({"llama.attention.value_length": 16}, "attention.value_length is 16, but a key is 8 wide"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4, but a key is 8 wide"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"is \[1, 2\] over the layers"),
        ({"llama.feed_forward_length": [0.5, 0.5]}, r"is \[0\.5\] over the layers"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer of the kind 't5'; pocketlm reads gpt2 and llama"),
    ],
)
def test_models_that_there_is_no_code_for(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    tiny_gguf(tmp_path / "other.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(source(tmp_path / "other.gguf"))


def test_neutral_and_harmless_keys_are_accepted(tmp_path: Path) -> None:
    metadata = {
        "llama.expert_count": 0,
        "llama.attention.causal": True,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.tensor_data_layout": "Meta AI original pth",
        "general.type": "model",
        "split.count": 1,
        "other.expert_count": 8,
    }
    tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    assert open_checkpoint(source(tmp_path / "tiny.gguf")).config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, r"says nothing about llama\.block_count"),
        ({"llama.block_count": 0}, r"llama\.block_count is 0, expected a positive"),
        ({"llama.block_count": -1}, r"llama\.block_count is -1, expected a positive"),
        ({"llama.block_count": 2**31}, "is 2147483648, expected a positive 32-bit integer"),
        ({"llama.block_count": "two"}, "is 'two', expected int"),
        ({"llama.block_count": 3}, r"has no tensor model\.layers\.2\.input_layernorm\.weight"),
        ({"llama.block_count": 2**31 - 1}, r"has no tensor model\.layers\.2\.input_layernorm\.weight"),
        (
            {"llama.embedding_length": 64, "llama.rope.dimension_count": 16},
            r"model\.embed_tokens\.weight has the shape \(16, 32\), expected \(16, 64\)",
        ),
        ({"llama.attention.head_count": 8}, r"but a key is 4 wide"),
        (
            {"llama.attention.key_length": 7, "llama.rope.dimension_count": None},
            "heads are 7 wide, expected an even",
        ),
        ({"llama.block_count": 1}, r"holds more layers than the 1 that llama\.block_count says"),
        (
            {"llama.feed_forward_length": 32},
            r"gate_proj\.weight has the shape \(64, 32\), expected \(32, 32\)",
        ),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "is 0.0, expected a positive number"),
        ({"llama.rope.freq_base": float("nan")}, "is nan, expected a positive number"),
        ({"llama.rope.freq_base": float("inf")}, "is inf, expected a positive number"),
    ],
)
def test_impossible_configurations(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    tiny_gguf(tmp_path / "damaged.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source(tmp_path / "damaged.gguf"))


def test_a_number_beyond_float32(tmp_path: Path) -> None:
    pairs = [ARCHITECTURE]
    for key, value in llama_metadata(CONFIG).items():
        if isinstance(value, int):
            pairs.append(number(key, 4, struct.pack("<I", value)))
    pairs.append(number("llama.attention.layer_norm_rms_epsilon", 12, struct.pack("<d", 1e300)))
    content = raw_gguf(pairs, [("token_embd.weight", [8], 0, 0)], bytes(32))
    (tmp_path / "double.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is 1e.300, expected a positive number"):
        open_checkpoint(source(tmp_path / "double.gguf"))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"output_norm.weight": None},
            CheckpointError,
            r"has no tensor model\.norm\.weight, which a llama model",
        ),
        (
            {"token_embd.weight": None},
            CheckpointError,
            r"has no tensor token_embd\.weight: it holds a vocabulary only",
        ),
        (
            {"blk.1.attn_k.weight": None},
            CheckpointError,
            r"has no tensor model\.layers\.1\.self_attn\.k_proj",
        ),
        (
            {"blk.0.attn_q.bias": np.zeros(7, np.float32)},
            CheckpointError,
            r"q_proj\.bias has the shape \(7,\)",
        ),
        (
            {"token_embd.weight": np.zeros((9, 32), np.float32), "output.weight": None},
            CheckpointError,
            "has 16 tokens, but an embedding for 9 only",
        ),
        (
            {"blk.0.attn_q_norm.weight": np.zeros(8, np.float32)},
            UnsupportedModelError,
            "the tensor 'blk.0.attn_q_norm.weight', which is not part of the llama architecture",
        ),
        ({"blk.01.attn_q.weight": np.zeros(8, np.float32)}, UnsupportedModelError, "not part of the llama"),
        (
            {f"blk.{'9' * 40}.attn_q.weight": np.zeros(8, np.float32)},
            UnsupportedModelError,
            "not part of the llama",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: dict[str, Any], kind: type[CheckpointError], message: str
) -> None:
    tiny_gguf(tmp_path / "damaged.gguf", change=change)
    with pytest.raises(kind, match=message):
        open_checkpoint(source(tmp_path / "damaged.gguf"))


def test_a_file_without_an_architecture(tmp_path: Path) -> None:
    (tmp_path / "bare.gguf").write_bytes(raw_gguf())
    with pytest.raises(CheckpointError, match=r"says nothing about general\.architecture"):
        open_checkpoint(source(tmp_path / "bare.gguf"))
