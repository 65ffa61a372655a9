"""What the architectures read from a checkpoint, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from helpers.tiny import CONFIG, read_weights, tiny_checkpoint
from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.checkpoint import Checkpoint
from pocketlm_exporters.decoder import DecoderConfig

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = [10_000 ** (-2 * pair / 16) for pair in range(8)]


def with_config(**config: Any) -> Checkpoint:
    """Only the config differs, not the tensors."""
    checkpoint = tiny_checkpoint()
    return dataclasses.replace(checkpoint, config={**checkpoint.config, **config})


def config_of(**config: Any) -> DecoderConfig:
    return read_weights(with_config(**config)).config


def test_sizes_come_from_the_config() -> None:
    config = config_of()
    found = (
        config.layers,
        config.hidden,
        config.intermediate,
        config.heads,
        config.kv_heads,
        config.head_dim,
    )
    assert found == (2, 64, 96, 4, 2, 16)
    assert (config.family, config.context_length, config.norm_epsilon) == ("llama", 512, 1e-5)
    assert config.vocabulary == CONFIG["vocab_size"]


def test_what_a_config_may_leave_out() -> None:
    checkpoint = tiny_checkpoint(num_key_value_heads=4)
    absent = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act")
    left = {key: value for key, value in checkpoint.config.items() if key not in absent}
    config = read_weights(dataclasses.replace(checkpoint, config=left)).config
    assert (config.head_dim, config.kv_heads, config.norm_epsilon) == (16, 4, 1e-6)
    assert config.attention[0].inverse_frequencies == pytest.approx(PLAIN)


def test_packs_linears_that_share_an_input() -> None:
    checkpoint = tiny_checkpoint(biases=True)
    attention = "model.layers.1.self_attn"
    parts = [f"{attention}.{part}_proj" for part in "qkv"]
    weights = read_weights(checkpoint)
    qkv, tensors = weights.linears["layers.1.qkv"], checkpoint.tensors
    assert (qkv.outputs, qkv.inputs) == (128, 64)
    scale = np.repeat([0.25, 1], 64).astype(np.float32)  # of attention: 1 / √16 in the queries
    weight, bias = (
        np.concatenate([tensors[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")
    )
    assert (qkv.weight() == weight * scale[:, None]).all()
    assert (qkv.bias == bias * scale).all()
    assert set(weights.norms) == {"final_norm"} | {
        f"layers.{n}.{kind}_norm" for n in (0, 1) for kind in ("attention", "mlp")
    }


def test_a_bias_that_only_some_have_is_zero_for_the_others() -> None:
    bias = np.full(32, 0.5, np.float32)
    weights = read_weights(tiny_checkpoint(change={"model.layers.0.self_attn.k_proj.bias": bias}))
    packed = weights.linears["layers.0.qkv"].bias
    assert packed is not None
    assert (packed == np.concatenate([np.zeros(64), bias, np.zeros(32)])).all()
    assert weights.linears["layers.1.qkv"].bias is None


@pytest.mark.parametrize(("tied", "has_head"), [(True, False), (False, True), (None, True)])
def test_whether_there_is_a_head(tied: bool | None, has_head: bool) -> None:
    checkpoint = tiny_checkpoint()
    config = {key: value for key, value in checkpoint.config.items() if key != "tie_word_embeddings"}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    assert ("head" in read_weights(dataclasses.replace(checkpoint, config=config)).linears) is has_head


def test_without_a_word_on_it_a_missing_head_is_tied() -> None:
    checkpoint = tiny_checkpoint(tie_word_embeddings=None, change={"lm_head.weight": None})
    assert "head" not in read_weights(checkpoint).linears


def frequencies_of(**config: Any) -> tuple[float, ...]:
    return config_of(**config).attention[0].inverse_frequencies


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_linear_scaling(key: str) -> None:
    scaled = [frequency / 4 for frequency in PLAIN]
    assert frequencies_of(**{key: LINEAR}) == pytest.approx(scaled)
    assert frequencies_of(**{key: {"type": "linear", "factor": 4}}) == pytest.approx(scaled)


def test_llama3_scaling_leaves_short_waves_and_stretches_long_ones() -> None:
    found = frequencies_of(rope_scaling=LLAMA3)
    for frequency, plain in zip(found, PLAIN, strict=True):
        wavelength = 2 * math.pi / plain
        if wavelength < 64 / 4:
            assert frequency == pytest.approx(plain)
        elif wavelength > 64:
            assert frequency == pytest.approx(plain / 8)
        else:
            assert plain / 8 < frequency < plain
    assert {PLAIN[0] == found[0], found[-1] == pytest.approx(PLAIN[-1] / 8)} == {True}


def test_each_pair_has_its_own_factor() -> None:
    factors = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    found = frequencies_of(rope_scaling={"rope_type": "factors", "factors": factors})
    assert found == pytest.approx([plain / factor for plain, factor in zip(PLAIN, factors, strict=True)])


def test_the_base_is_where_either_generation_of_configs_has_it() -> None:
    found = frequencies_of(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert found == frequencies_of(rope_theta=500.0) == frequencies_of(rope_theta=500)


@pytest.mark.parametrize(
    ("family", "window", "expected"),
    [
        ("mistral", 64, 64),
        ("mistral", None, None),
        ("mistral", 512, None),  # as long as the context: it never bites
        ("llama", 64, None),  # transformers' Llama has none, whatever its config says
    ],
)
def test_sliding_window(family: str, window: int | None, expected: int | None) -> None:
    assert config_of(model_type=family, sliding_window=window).attention[0].sliding_window == expected


@pytest.mark.parametrize("family", ["gpt_neox", None])
def test_an_unsupported_family_names_the_supported_ones(family: str | None) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"'{family}'; supported are gemma3_text, llama, mistral\."
    ):
        read_weights(with_config(model_type=family))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the llama family is built with 'silu'"),
        ({"head_dim": 24}, "head_dim is 24; a multiple of 16"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'; supported are default, linear and"),
    ],
)
def test_unsupported_variants(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 64.0}, r"hidden_size is 64\.0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "4 heads in 3 groups"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"head_dim": "wide"}, "head_dim is 'wide'"),
        ({"head_dim": -16}, "head_dim is -16"),
        ({"model_type": "mistral", "sliding_window": "far"}, "sliding_window is 'far'"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "factor is inf"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        (
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor is 1.0; more than low_freq_factor",
        ),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0] * 7}}, "7 factors, expected 8"),
    ],
)
def test_bad_config_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(**config)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
        read_weights(tiny_checkpoint(change={name: None}))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"]
)
def test_a_tensor_of_another_shape(name: str) -> None:
    change = {name: np.zeros((3, 5), np.float32)}
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(3, 5\), the config calls for"):
        for linear in read_weights(tiny_checkpoint(change=change)).linears.values():
            linear.weight()


def test_a_mistral_that_says_nothing_has_a_window_of_4096() -> None:
    read = config_of(model_type="mistral", max_position_embeddings=8192)
    assert read.attention[0].sliding_window == 4096
    assert config_of(model_type="llama", max_position_embeddings=8192).attention[0].sliding_window is None
