"""The llama family: Llama, SmolLM2, Mistral. RMS norms, grouped heads, rotary positions, SwiGLU.

Two exports, as every architecture has them: `read` (what the checkpoint holds) and `decoder` (the graph).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from pocketlm.errors import UnsupportedModelError
from pocketlm.manifest import GraphIO
from pocketlm_exporters.architectures.checked_tensors import CheckedTensors, is_tied, layer_linears
from pocketlm_exporters.architectures.config_values import check_heads, number, positive
from pocketlm_exporters.architectures.rope import inverse_frequencies
from pocketlm_exporters.checkpoint.types import Checkpoint
from pocketlm_exporters.decoder import Array, DecoderConfig, DecoderWeights, LayerAttention, Linear
from pocketlm_exporters.graph.attention import Packed, attention, in_sequences, read_step
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.embedding import EmbeddingEmitter, flat
from pocketlm_exporters.graph.head import output_rows, select_rows
from pocketlm_exporters.graph.linear import LinearEmitter
from pocketlm_exporters.graph.mlp import swiglu
from pocketlm_exporters.graph.norm import add_rms_norm, rms_norm
from pocketlm_exporters.graph.rotary import rotary_tables

_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def read(checkpoint: Checkpoint) -> DecoderWeights:
    """The sizes and the weights, linears that share an input packed into one.

    Raises UnsupportedModelError for a variant that the graph does not compute and CheckpointError for
    tensors that are missing or of another shape than the config says.
    """
    config = _read_config(checkpoint.config)
    tensors = CheckedTensors(checkpoint.tensors)
    linears: dict[str, Linear] = {}
    norms: dict[str, Array] = {"final_norm": tensors.read("model.norm.weight", (config.hidden,))}
    for n in range(config.layers):
        block, layer = f"model.layers.{n}", f"layers.{n}"
        for path, name in _NORMS.items():
            norms[f"{layer}.{path}"] = tensors.read(f"{block}.{name}.weight", (config.hidden,))
        linears |= layer_linears(tensors, config, n)
        linears[f"{layer}.qkv"] = _scaled_queries(linears[f"{layer}.qkv"], config)
    if not is_tied(checkpoint):
        linears["head"] = tensors.packed({"lm_head": config.vocabulary}, config.hidden)
    table = tensors.packed({"model.embed_tokens": config.vocabulary}, config.hidden)
    return DecoderWeights(config, table.weight, linears, norms)


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
    tables = rotary_tables(g, config.attention[0].inverse_frequencies, config.context_length)
    residual = embedding(g, flat(g, ids))
    normed = norm(residual, "layers.0.attention_norm")
    for n in range(config.layers):
        layer = f"layers.{n}"
        qkv = linears[f"{layer}.qkv"](g, normed, f"{layer}.qkv")
        heads = Packed(in_sequences(g, qkv, step, f"{layer}.heads"), tables)
        attended = attention(g, heads, n, config, io, step)
        if n == config.layers - 1:  # from here on only the rows that are asked for matter
            attended = select_rows(g, attended, rows, "last.attended")
            residual = select_rows(g, residual, rows, "last.residual")
        output = linears[f"{layer}.output"](g, attended, f"{layer}.output")
        normed, residual = add_norm(output, residual, f"{layer}.mlp_norm")
        gate_up = linears[f"{layer}.gate_up"](g, normed, f"{layer}.gate_up")
        hidden = swiglu(g, gate_up, config.intermediate, f"{layer}.mlp")
        down = linears[f"{layer}.down"](g, hidden, f"{layer}.down")
        following = "final_norm" if n == config.layers - 1 else f"layers.{n + 1}.attention_norm"
        normed, residual = add_norm(down, residual, following)
    output_rows(g, normed, linears["head"], weights, io)
    return g


def _scaled_queries(qkv: Linear, config: DecoderConfig) -> Linear:
    """With attention's 1 / √head_dim in the rows that make queries."""
    rows = np.ones(qkv.outputs, np.float32)
    rows[: config.heads * config.head_dim] = config.head_dim**-0.5
    return replace(
        qkv,
        weight=lambda: qkv.weight() * rows[:, None],
        bias=None if qkv.bias is None else qkv.bias * rows,
    )


def _read_config(config: Mapping[str, Any]) -> DecoderConfig:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(
            f"The config's hidden_act is {activation!r}; the llama family is built with 'silu'."
        )
    heads = positive(config, "num_attention_heads")
    hidden = positive(config, "hidden_size")
    kv_heads = positive(config, "num_key_value_heads", heads)
    head_dim = positive(config, "head_dim", hidden // heads)
    check_heads(heads, kv_heads, head_dim)
    context_length = positive(config, "max_position_embeddings")
    window = context_length
    # As transformers has it: a llama has no window, whatever its config says.
    if config["model_type"] == "mistral":
        with_default = {"sliding_window": 4096, **config}
        if with_default["sliding_window"] is not None:
            window = positive(with_default, "sliding_window")
    layers = positive(config, "num_hidden_layers")
    attends = LayerAttention(
        inverse_frequencies(config, head_dim), sliding_window=window if window < context_length else None
    )
    return DecoderConfig(
        family=str(config["model_type"]),
        layers=layers,
        hidden=hidden,
        intermediate=positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=positive(config, "vocab_size"),
        context_length=context_length,
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        attention=(attends,) * layers,
    )
