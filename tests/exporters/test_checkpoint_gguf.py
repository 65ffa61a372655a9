"""GGUF files as checkpoints: values, names, row order and configuration."""

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from helpers.checkpoints import (
    CONFIG,
    gguf_name,
    llama_metadata,
    llama_tensors,
    permute,
    source,
    stored_tensors,
    tiny_gguf,
    write_gguf,
)
from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.checkpoint import Checkpoint, open_checkpoint
from pocketlm_exporters.checkpoint.gguf_families import unpermute
from pocketlm_exporters.checkpoint.gguf_file import GgufFile

QUANTIZABLE = [
    Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.TQ1_0, Q.TQ2_0
]  # fmt: skip
DEQUANTIZABLE = [
    Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ1_S, Q.IQ1_M,
    Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S, Q.IQ4_NL, Q.IQ4_XS,
]  # fmt: skip
# Types of later releases of the library.
DEQUANTIZABLE += [Q[name] for name in ("MXFP4", "NVFP4") if name in Q.__members__]
WIDE = {**CONFIG, "hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1}  # rows of whole blocks of 256


def opened(tmp_path: Path, **options: Any) -> Checkpoint:
    tiny_gguf(tmp_path / "tiny.gguf", **options)
    return open_checkpoint(source(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_comes_back_under_its_hugging_face_name(
    tmp_path: Path, biases: bool, tied: bool
) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    tensors = tiny_gguf(tmp_path / "tiny.gguf", config=config, biases=biases)
    checkpoint = open_checkpoint(source(tmp_path / "tiny.gguf"))
    assert set(checkpoint.tensors) == set(tensors)
    assert len(checkpoint.tensors) == len(tensors)
    for name, tensor in tensors.items():
        assert name in checkpoint.tensors
        np.testing.assert_array_equal(checkpoint.tensors[name], tensor, err_msg=name)
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert checkpoint.config["attention_bias"] is biases
    assert checkpoint.config["mlp_bias"] is biases


@pytest.mark.parametrize("type_", QUANTIZABLE, ids=lambda type_: type_.name)
def test_types_that_the_library_quantizes(tmp_path: Path, type_: Q) -> None:
    tensors = llama_tensors(WIDE)
    stored = stored_tensors(WIDE, tensors)
    linears = {
        name: type_ for name, tensor in stored.items() if tensor.ndim == 2 and tensor.shape[1] % 256 == 0
    }
    path = write_gguf(tmp_path / "q.gguf", llama_metadata(WIDE), stored, linears)
    checkpoint = open_checkpoint(source(path))
    assert linears
    for name in tensors:
        if gguf_name(name) not in linears:
            continue
        expected = gguf.quants.dequantize(gguf.quants.quantize(stored[gguf_name(name)], type_), type_)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        got = checkpoint.tensors[name]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(permute(got, heads) if heads else got, expected, err_msg=name)
    assert f"{type_.name} × " in checkpoint.source.format


@pytest.mark.parametrize("type_", DEQUANTIZABLE, ids=lambda type_: type_.name)
def test_types_that_the_library_only_dequantizes(tmp_path: Path, type_: Q) -> None:
    block, size = gguf.GGML_QUANT_SIZES[type_]
    # Small bytes keep 16-bit scales finite.
    raw = np.random.default_rng(1).integers(0, 0x3C, (3, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "raw.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = GgufFile(tmp_path / "raw.gguf").read("w")
    assert got.shape == (3, 512)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, gguf.quants.dequantize(raw, type_))
    (tensor,) = gguf.GGUFReader(tmp_path / "raw.gguf").tensors
    np.testing.assert_array_equal(got, gguf.quants.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (4, 6)])
@pytest.mark.parametrize("columns", [(), (5,)])
def test_unpermute_undoes_the_converters_permutation(
    heads: int, width: int, columns: tuple[int, ...]
) -> None:
    rows = np.random.default_rng(2).standard_normal((heads * width, *columns)).astype(np.float32)
    np.testing.assert_array_equal(unpermute(permute(rows, heads), heads), rows)


def test_the_configuration(tmp_path: Path) -> None:
    expected = {**CONFIG, "rope_scaling": None, "attention_bias": False, "mlp_bias": False}
    assert opened(tmp_path).config == expected


def test_what_a_sparse_file_leaves_to_defaults(tmp_path: Path) -> None:
    left_out = ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count")
    config = {**CONFIG, "num_key_value_heads": 4}
    metadata = {f"llama.{key}": None for key in left_out}
    read = opened(tmp_path, config=config, metadata=metadata).config
    assert (read["num_key_value_heads"], read["rope_theta"], read["head_dim"]) == (4, 10_000.0, 8)


def test_a_key_width_of_its_own(tmp_path: Path) -> None:
    config = {**CONFIG, "head_dim": 16}
    metadata = {"llama.attention.key_length": 16, "llama.attention.value_length": 16}
    checkpoint = opened(tmp_path, config=config, metadata=metadata)
    assert checkpoint.config["head_dim"] == 16
    assert checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].shape == (64, 32)


def test_a_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    config = opened(tmp_path, metadata={"llama.attention.sliding_window": 64}).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)
    config = opened(tmp_path, metadata={"llama.attention.sliding_window": 0}).config
    assert config["model_type"] == "llama"
    assert "sliding_window" not in config


def test_values_stored_once_a_layer(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "llama.attention.head_count_kv": [2, 2],
        "llama.feed_forward_length": [64, 64],
    }
    config = opened(tmp_path, metadata=metadata).config
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 64)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5, "rope.scaling.finetuned": True},
            {"rope_type": "linear", "factor": 2.5},
        ),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_attn_factor": 1.5,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.5,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any] | None) -> None:
    metadata = {f"llama.{key}": value for key, value in metadata.items()}
    assert opened(tmp_path, metadata=metadata).config["rope_scaling"] == expected


def test_llama_3_scaling_is_passed_on_as_factors(tmp_path: Path) -> None:
    factors = np.array([1, 1, 1.5, 8], np.float32)
    checkpoint = opened(tmp_path, change={"rope_freqs.weight": factors})
    assert checkpoint.config["rope_scaling"] == {"rope_type": "factors", "factors": [1.0, 1.0, 1.5, 8.0]}
    assert not any("rope" in name for name in checkpoint.tensors)
    checkpoint = opened(tmp_path, change={"rope_freqs.weight": np.ones(4, np.float32)})
    assert checkpoint.config["rope_scaling"] is None


def test_rope_scaling_that_cannot_be(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.array([1, 1, 1.5, 8], np.float32)}
    with pytest.raises(UnsupportedModelError, match="scales rotary frequencies twice"):
        opened(tmp_path, change=factors, metadata={"llama.rope.scale_linear": 2.0})
    with pytest.raises(UnsupportedModelError, match="'longrope'; pocketlm reads none, linear and yarn"):
        opened(tmp_path, metadata={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(CheckpointError, match=r"says nothing about llama\.rope\.scaling\.factor"):
        opened(tmp_path, metadata={"llama.rope.scaling.type": "yarn"})
    for damaged in ([1, 1, 1], [1, 0, 1, 1], [1, np.nan, 1, 1]):
        with pytest.raises(CheckpointError, match="expected 4 positive divisors"):
            opened(tmp_path, change={"rope_freqs.weight": np.array(damaged, np.float32)})


def test_the_record_of_the_source(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", metadata={"general.license": "apache-2.0"})
    heard = []
    checkpoint = open_checkpoint(
        source(tmp_path / "tiny.gguf"), progress=lambda *report: heard.append(report)
    )
    record = checkpoint.source
    assert (record.kind, record.location, record.revision) == ("gguf", "tests/tiny", "r1")
    assert record.sha256 == hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    assert record.format == "F32 × 21"
    assert (checkpoint.name, checkpoint.licence) == ("tiny", "apache-2.0")
    assert open_checkpoint(source(tmp_path / "tiny.gguf", licence="MIT")).licence == "MIT"
    _, done, total, unit = heard[-1]
    assert (done, unit) == (total, "B")


def test_types_are_listed_by_their_number(tmp_path: Path) -> None:
    stored = stored_tensors(CONFIG, llama_tensors(CONFIG))
    types = {"token_embd.weight": Q.Q8_0, "blk.0.attn_q.weight": Q.Q4_1, "blk.1.attn_q.weight": Q.Q4_1}
    path = write_gguf(tmp_path / "mixed.gguf", llama_metadata(CONFIG), stored, types)
    assert open_checkpoint(source(path)).source.format == "F32 × 18, Q4_1 × 2, Q8_0 × 1"


def test_a_missing_name_is_a_key_error_and_says_so(tmp_path: Path) -> None:
    tensors = opened(tmp_path).tensors
    assert "model.nrm.weight" not in tensors
    assert tensors.get("model.nrm.weight") is None
    with pytest.raises(KeyError):
        tensors["model.nrm.weight"]
    with pytest.raises(CheckpointError, match=r"has no tensor model\.nrm\.weight among its 21\."):
        tensors["model.nrm.weight"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_reported_when_read(tmp_path: Path, value: float) -> None:
    damaged = llama_tensors(CONFIG)["model.norm.weight"].copy()
    damaged[3] = value
    checkpoint = opened(tmp_path, change={"output_norm.weight": damaged})
    assert checkpoint.tensors["model.embed_tokens.weight"].size
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity"):
        checkpoint.tensors["model.norm.weight"]
