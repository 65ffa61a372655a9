"""The text models of the Gemma 3 family (arXiv 2503.19786).

Beyond llama's parts: RMS norms behind each block too, before the residual addition, and on each head's query
and key; most layers see a sliding window only, with rotary frequencies of their own; GeGLU; embeddings
scaled by √hidden.

Two exports, as every architecture has them: `read` (what the checkpoint holds) and `decoder` (the graph).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm.manifest import GraphIO
from pocketlm_exporters.architectures.checked_tensors import CheckedTensors, is_tied, layer_linears
from pocketlm_exporters.architectures.config_values import check_heads, number, positive
from pocketlm_exporters.architectures.rope import inverse_frequencies
from pocketlm_exporters.checkpoint.types import Checkpoint
from pocketlm_exporters.decoder import Array, DecoderConfig, DecoderWeights, LayerAttention, Linear
from pocketlm_exporters.graph.attention import Apart, attention, in_sequences, read_step
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.embedding import EmbeddingEmitter, flat
from pocketlm_exporters.graph.head import output_rows, select_rows
from pocketlm_exporters.graph.linear import LinearEmitter
from pocketlm_exporters.graph.mlp import geglu
from pocketlm_exporters.graph.norm import add_rms_norm, rms_norm
from pocketlm_exporters.graph.rotary import RotaryRows, rotary_rows, rotate, step_positions

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def read(checkpoint: Checkpoint) -> DecoderWeights:
    """The sizes and the weights, linears that share an input packed into one.

    Embeddings are scaled by √hidden here, not in the graph; a tied head's norm takes that back. The scale of
    attention is in the norms of queries. Raises
    UnsupportedModelError for a variant that the graph does not compute and CheckpointError for tensors that
    are missing or of another shape than the config says.
    """
    config = _read_config(checkpoint.config)
    tensors = CheckedTensors(checkpoint.tensors)

    def norm(name: str, width: int) -> Array:
        stored: Array = tensors.read(f"{name}.weight", (width,))
        return stored + np.float32(1)  # the checkpoint has what is to be added to one

    scale = np.float32(math.sqrt(config.hidden))
    attention_scale = np.float32(number(checkpoint.config, "query_pre_attn_scalar", 256) ** -0.5)
    linears: dict[str, Linear] = {}
    norms = {"final_norm": norm("model.norm", config.hidden)}
    for n in range(config.layers):
        block, layer = f"model.layers.{n}", f"layers.{n}"
        norms |= {f"{layer}.{path}": norm(f"{block}.{name}", config.hidden) for path, name in _NORMS.items()}
        norms |= {
            f"{layer}.{path}": norm(f"{block}.{name}", config.head_dim) for path, name in _HEAD_NORMS.items()
        }
        norms[f"{layer}.query_norm"] *= attention_scale
        linears |= layer_linears(tensors, config, n)
    hidden_map: Array | None = None
    if is_tied(checkpoint):
        norms["final_norm"] /= scale
        hidden_map = np.full(config.hidden, scale, np.float32)
    else:
        linears["head"] = tensors.packed({"lm_head": config.vocabulary}, config.hidden)
    table = tensors.packed({"model.embed_tokens": config.vocabulary}, config.hidden)
    return DecoderWeights(config, lambda: table.weight() * scale, linears, norms, hidden_map)


def decoder(
    weights: DecoderWeights,
    embedding: EmbeddingEmitter,
    linears: Mapping[str, LinearEmitter],
    io: GraphIO,
) -> GraphBuilder:
    """The fused graph. `linears` has one emitter for each linear of `weights`, and for the head."""
    config, norms = weights.config, weights.norms
    g = GraphBuilder(config.family)
    ids = g.input(io.input_ids, ir.DataType.INT64, ("batch", "tokens"))
    past_lengths = g.input(io.past_lengths, ir.DataType.INT32, ("batch",))
    rows = g.input(io.logit_rows, ir.DataType.INT64, ("rows",))

    def norm(x: ir.Value, path: str) -> ir.Value:
        return rms_norm(g, x, norms[path], config.norm_epsilon, path)

    def add_norm(x: ir.Value, residual: ir.Value, path: str) -> tuple[ir.Value, ir.Value]:
        return add_rms_norm(g, x, residual, norms[path], config.norm_epsilon, path)

    step = read_step(g, ids, past_lengths, config)
    rotary = _rotary(g, ids, past_lengths, config)
    residual = embedding(g, flat(g, ids))
    normed = norm(residual, "layers.0.attention_norm")
    for n in range(config.layers):
        layer = f"layers.{n}"
        qkv = linears[f"{layer}.qkv"](g, normed, f"{layer}.qkv")
        qkv = in_sequences(g, qkv, step, f"{layer}.sequences")
        heads = _heads(g, qkv, weights, rotary[config.attention[n].inverse_frequencies], layer)
        attended = attention(g, heads, n, config, io, step)
        if n == config.layers - 1:  # from here on only the rows that are asked for matter
            attended = select_rows(g, attended, rows, "last.attended")
            residual = select_rows(g, residual, rows, "last.residual")
        output = linears[f"{layer}.output"](g, attended, f"{layer}.output")
        output = norm(output, f"{layer}.attention_post_norm")
        normed, residual = add_norm(output, residual, f"{layer}.mlp_norm")
        gate_up = linears[f"{layer}.gate_up"](g, normed, f"{layer}.gate_up")
        hidden = geglu(g, gate_up, config.intermediate, f"{layer}.mlp")
        down = linears[f"{layer}.down"](g, hidden, f"{layer}.down")
        down = norm(down, f"{layer}.mlp_post_norm")
        following = "final_norm" if n == config.layers - 1 else f"layers.{n + 1}.attention_norm"
        normed, residual = add_norm(down, residual, following)
    output_rows(g, normed, linears["head"], weights, io)
    return g


def _rotary(
    g: GraphBuilder, ids: ir.Value, past_lengths: ir.Value, config: DecoderConfig
) -> dict[tuple[float, ...], RotaryRows]:
    """By the frequencies, of which local and global layers have different ones."""
    positions = step_positions(g, ids, past_lengths)
    kinds = dict.fromkeys(attends.inverse_frequencies for attends in config.attention)
    return {each: rotary_rows(g, positions, each, f"rotary.{n}") for n, each in enumerate(kinds)}


def _heads(g: GraphBuilder, qkv: ir.Value, weights: DecoderWeights, rotary: RotaryRows, layer: str) -> Apart:
    """Each head's query and key normed and rotated. What both need is done to both at once."""
    config, norms = weights.config, weights.norms
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    path = f"{layer}.heads"
    sizes = g.constant("queries_and_keys_and_values", np.array([queries + keys, keys], np.int64))
    both, values = g.ops("Split", qkv, sizes, name=path, outputs=(f"{path}.both", f"{path}.values"), axis=-1)
    apart = g.constant("heads_apart", np.array([0, 0, -1, config.head_dim], np.int64))
    together = g.constant("heads_together", np.array([0, 0, queries + keys], np.int64))
    scale = np.stack(
        [norms[f"{layer}.query_norm"]] * config.heads + [norms[f"{layer}.key_norm"]] * config.kv_heads
    )
    each = g.op("Reshape", both, apart, name=f"{path}.apart")
    normed = rms_norm(g, each, scale, config.norm_epsilon, f"{path}.norm")
    rotated = rotate(g, g.op("Reshape", normed, together, name=f"{path}.together"), rotary, f"{path}.rotated")
    sizes = g.constant("queries_and_keys", np.array([queries, keys], np.int64))
    query, key = g.ops(
        "Split",
        rotated,
        sizes,
        name=f"{path}.split",
        outputs=(f"{path}.queries", f"{path}.keys"),
        axis=-1,
    )
    return Apart(query, key, values)


def _read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """What a config may leave out has the value that transformers' Gemma3TextConfig gives it."""
    _refuse_variants(config)
    heads, kv_heads = positive(config, "num_attention_heads", 8), positive(config, "num_key_value_heads", 4)
    head_dim = positive(config, "head_dim", 256)
    check_heads(heads, kv_heads, head_dim)
    layers = positive(config, "num_hidden_layers")
    context_length = positive(config, "max_position_embeddings", 131_072)
    return DecoderConfig(
        family=str(config["model_type"]),
        layers=layers,
        hidden=positive(config, "hidden_size"),
        intermediate=positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=positive(config, "vocab_size"),
        context_length=context_length,
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        attention=_attention(config, _layer_types(config, layers), head_dim, context_length),
    )


def _refuse_variants(config: Mapping[str, Any]) -> None:
    expected: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
    for key, value in expected.items():
        if (found := config.get(key, value)) != value:
            raise UnsupportedModelError(
                f"The config's {key} is {found!r}; the gemma3 family is built with {value!r}."
            )


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Which layers see everything and which a window: listed, or every so many layers one that sees all."""
    types = config.get("layer_types")
    if types is None:
        pattern = positive(config, "sliding_window_pattern", 6)
        return [_LOCAL if (n + 1) % pattern else _GLOBAL for n in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not {*map(str, types)} <= {_GLOBAL, _LOCAL}:
        raise CheckpointError(
            f"The config's layer_types are {types!r:.200}; for each of {layers} layers {_GLOBAL!r} or "
            f"{_LOCAL!r} is expected."
        )
    return types


def _attention(
    config: Mapping[str, Any], types: list[str], head_dim: int, context_length: int
) -> tuple[LayerAttention, ...]:
    rope = {_GLOBAL: {"rope_theta": 1_000_000.0, **config}}
    rope[_LOCAL] = {"rope_theta": number(config, "rope_local_base_freq", 10_000.0)}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and _GLOBAL in parameters:  # as transformers 5 has it
        rope = {kind: {"rope_parameters": parameters.get(kind)} for kind in rope}
    window = positive(config, "sliding_window", 4096) if _LOCAL in types else context_length
    kinds = {
        _GLOBAL: LayerAttention(inverse_frequencies(rope[_GLOBAL], head_dim), None),
        _LOCAL: LayerAttention(
            inverse_frequencies(rope[_LOCAL], head_dim), window if window < context_length else None
        ),
    }
    return tuple(kinds[each] for each in types)
