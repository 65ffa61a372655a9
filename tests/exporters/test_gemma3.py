"""What the Gemma 3 family reads from a checkpoint and refuses, and what becomes of it in eight bits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import pocketlm
from helpers.tiny import float_session, random_ids, read_weights, run, tiny_bundle
from helpers.tiny_gemma3 import gemma3_checkpoint
from pocketlm.bundle import WEIGHTS_NAME
from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm.manifest import read_manifest
from pocketlm_exporters.checkpoint import Checkpoint
from pocketlm_exporters.decoder import DecoderConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def with_config(**config: Any) -> Checkpoint:
    """Only the config differs, not the tensors; None removes a value."""
    checkpoint = gemma3_checkpoint()
    merged = {**checkpoint.config, **config}
    return dataclasses.replace(
        checkpoint, config={key: value for key, value in merged.items() if value is not None}
    )


def config_of(**config: Any) -> DecoderConfig:
    return read_weights(with_config(**config)).config


def frequencies(base: float) -> Any:
    return pytest.approx([base ** (-2 * pair / 16) for pair in range(8)])


def test_norms_are_what_is_added_to_one() -> None:
    checkpoint = gemma3_checkpoint(tie_word_embeddings=False)
    weights, tensors = read_weights(checkpoint), checkpoint.tensors
    names = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        "key_norm": "self_attn.k_norm",
    }
    for path, name in names.items():
        assert (weights.norms[f"layers.2.{path}"] == tensors[f"model.layers.2.{name}.weight"] + 1).all()
    assert (weights.norms["final_norm"] == tensors["model.norm.weight"] + 1).all()
    assert len(weights.norms) == 3 * 6 + 1
    assert not weights.rotatable


def test_the_embedding_is_scaled_and_a_tied_head_takes_it_back() -> None:
    tied, untied = gemma3_checkpoint(), gemma3_checkpoint(tie_word_embeddings=False)
    for checkpoint in (tied, untied):
        expected = checkpoint.tensors["model.embed_tokens.weight"] * 8  # √64
        assert (read_weights(checkpoint).embedding() == expected).all()
    assert "head" not in read_weights(tied).linears
    assert (read_weights(untied).linears["head"].weight() == untied.tensors["lm_head.weight"]).all()
    expected = (tied.tensors["model.norm.weight"] + 1) / 8
    np.testing.assert_allclose(read_weights(tied).norms["final_norm"], expected, rtol=1e-6)


def test_local_and_global_layers_differ_in_window_and_frequencies() -> None:
    local, everything, again = config_of().attention
    assert again == local
    assert (local.sliding_window, everything.sliding_window) == (24, None)
    assert local.inverse_frequencies == frequencies(10_000)
    assert everything.inverse_frequencies == frequencies(1_000_000)


@pytest.mark.parametrize(("scalar", "scale"), [(16, 0.25), (100, 0.1), (None, 1 / 16)])
def test_the_norm_of_queries_carries_the_scale_of_attention(scalar: float | None, scale: float) -> None:
    checkpoint = gemma3_checkpoint(query_pre_attn_scalar=scalar)
    for n, norms in enumerate([read_weights(checkpoint).norms] * 3):
        stored = checkpoint.tensors[f"model.layers.{n}.self_attn.q_norm.weight"]
        np.testing.assert_allclose(norms[f"layers.{n}.query_norm"], (stored + 1) * scale, rtol=1e-6)


def test_scaling_is_for_the_global_layers() -> None:
    local, everything, _ = config_of(rope_scaling={"rope_type": "linear", "factor": 8.0}).attention
    assert local.inverse_frequencies == frequencies(10_000)
    assert [8 * each for each in everything.inverse_frequencies] == frequencies(1_000_000)


def test_rope_parameters_as_transformers_5_has_them() -> None:
    parameters = {
        GLOBAL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        LOCAL: {"rope_type": "default", "rope_theta": 50.0},
    }
    local, everything, _ = config_of(rope_parameters=parameters).attention
    assert local.inverse_frequencies == frequencies(50)
    assert [2 * each for each in everything.inverse_frequencies] == frequencies(500)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"sliding_window_pattern": 3}, [24, 24, None]),
        ({"sliding_window_pattern": 1}, [None, None, None]),
        ({"sliding_window_pattern": None}, [24, 24, 24]),  # 6 by default
        ({"layer_types": [GLOBAL, LOCAL, LOCAL]}, [None, 24, 24]),
        ({"layer_types": [GLOBAL] * 3, "sliding_window": None}, [None, None, None]),
        ({"sliding_window": 512}, [None, None, None]),  # as long as the context: it never bites
        ({"sliding_window": None, "max_position_embeddings": 8192}, [4096, None, 4096]),
    ],
)
def test_which_layers_have_a_window(config: dict[str, Any], windows: list[int | None]) -> None:
    assert [each.sliding_window for each in config_of(**config).attention] == windows


def test_what_a_config_may_leave_out() -> None:
    config = config_of(max_position_embeddings=None, rope_theta=None, rope_local_base_freq=None)
    assert config.context_length == 131_072
    assert config.attention[0].inverse_frequencies == frequencies(10_000)
    assert config.attention[1].inverse_frequencies == frequencies(1_000_000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'; the gemma3 family is built with 'gelu"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0; .* built with None"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"head_dim": 24}, "head_dim is 24; a multiple of 16"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling is 'yarn'"),
    ],
)
def test_unsupported_variants(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": [LOCAL]}, r"layer_types are \['sliding_attention'\]; for each of 3 layers"),
        ({"layer_types": [LOCAL, LOCAL, "chunked"]}, "for each of 3 layers 'full_attention' or"),
        ({"layer_types": "local"}, "layer_types are 'local'"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"rope_local_base_freq": math.inf}, "rope_local_base_freq is inf"),
        ({"num_key_value_heads": 3}, "4 heads in 3 groups"),
    ],
)
def test_bad_config_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(**config)


@pytest.mark.parametrize(
    "name", ["pre_feedforward_layernorm", "post_feedforward_layernorm", "self_attn.q_norm"]
)
def test_a_missing_norm(name: str) -> None:
    full = f"model.layers.1.{name}.weight"
    with pytest.raises(CheckpointError, match=f"has no tensor {full}"):
        read_weights(gemma3_checkpoint(change={full: None}))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In eight bits; its checkpoint lies beside it."""
    return tiny_bundle(tmp_path_factory.mktemp("gemma3"), checkpoint=gemma3_checkpoint())


def test_eight_bits_stay_close_though_the_stream_cannot_be_rotated(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.family == "gemma3_text"
    assert manifest.quality is not None
    assert manifest.quality.kl_mean < 0.02
    assert manifest.precision.recipe.startswith("smoothed, behind norms too; ")
    assert manifest.calibration is not None
    assert manifest.calibration.smoothing == 0.6
    layers = {layer.path: layer.precision for layer in manifest.precision.layers}
    assert layers.pop("embedding") == "int8-block32"
    assert set(layers.values()) == {"int8-row"}
    assert "head" not in layers


def test_the_head_and_the_embedding_are_one_in_the_file(bundle: Path) -> None:
    graph = ir.load(bundle / "model.onnx").graph
    (gather,) = (node for node in graph if node.op_type == "GatherBlockQuantized")
    (head,) = (node for node in graph if node.op_type == "MatMulNBits")
    table = gather.inputs[0]
    assert table is not None
    assert table is head.inputs[1]
    stored = sum(each.const_value.nbytes for each in graph.initializers.values() if each.const_value)
    assert (bundle / WEIGHTS_NAME).stat().st_size < stored + 4096 * len(graph.initializers)


def test_a_head_of_its_own_is_an_integer_product_too(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path, checkpoint=gemma3_checkpoint(tie_word_embeddings=False))
    layers = {layer.path: layer.precision for layer in read_manifest(folder).precision.layers}
    assert layers["head"] == "int8-row"


def test_a_bundle_answers_in_a_chat(bundle: Path) -> None:
    with pocketlm.load(bundle, threads=1) as model:
        completion = model.generate("Who are you?", max_tokens=4)
        again = model.generate("Who are you?", max_tokens=4)
    assert completion.usage.completion_tokens > 0
    assert again.text == completion.text


def test_chunks_and_single_tokens_agree_far_beyond_the_window(tmp_path: Path) -> None:
    checkpoint = gemma3_checkpoint()
    session = float_session(checkpoint, read_weights(checkpoint), tmp_path)
    ids = random_ids(100)
    whole = run(session, ids)
    for sizes in ([1], [40, 1], [7, 30]):
        assert np.abs(run(session, ids, sizes) - whole).max() < 1e-4
