"""The llama family: Llama, SmolLM2, Mistral. RMS norms, grouped heads, rotary positions, SwiGLU.

Two exports, as every architecture has them: `read` (what the checkpoint holds) and `decoder` (the graph).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm.manifest import GraphIO
from pocketlm_exporters.checkpoint.types import Checkpoint, Tensors
from pocketlm_exporters.decoder import Array, DecoderConfig, DecoderWeights, Linear
from pocketlm_exporters.graph.attention import attention, read_step
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.embedding import EmbeddingEmitter
from pocketlm_exporters.graph.linear import LinearEmitter
from pocketlm_exporters.graph.mlp import swiglu
from pocketlm_exporters.graph.norm import add_rms_norm, rms_norm


def read(checkpoint: Checkpoint) -> DecoderWeights:
    """The sizes and the weights, linears that share an input packed into one.

    Raises UnsupportedModelError for a variant that the graph does not compute and CheckpointError for
    tensors that are missing or of another shape than the config says.
    """
    config = _read_config(checkpoint.config)
    tensors = _CheckedTensors(checkpoint.tensors)
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linears: dict[str, Linear] = {}
    norms: dict[str, Array] = {"final_norm": tensors.read("model.norm.weight", (config.hidden,))}
    for n in range(config.layers):
        block, layer = f"model.layers.{n}", f"layers.{n}"
        norms[f"{layer}.attention_norm"] = tensors.read(f"{block}.input_layernorm.weight", (config.hidden,))
        norms[f"{layer}.mlp_norm"] = tensors.read(
            f"{block}.post_attention_layernorm.weight", (config.hidden,)
        )
        attend, mlp = f"{block}.self_attn", f"{block}.mlp"
        qkv = {f"{attend}.q_proj": queries, f"{attend}.k_proj": keys, f"{attend}.v_proj": keys}
        linears[f"{layer}.qkv"] = tensors.packed(qkv, config.hidden)
        linears[f"{layer}.output"] = tensors.packed({f"{attend}.o_proj": config.hidden}, queries)
        gate_up = {f"{mlp}.gate_proj": config.intermediate, f"{mlp}.up_proj": config.intermediate}
        linears[f"{layer}.gate_up"] = tensors.packed(gate_up, config.hidden)
        linears[f"{layer}.down"] = tensors.packed({f"{mlp}.down_proj": config.hidden}, config.intermediate)
    if not checkpoint.config.get("tie_word_embeddings", "lm_head.weight" not in checkpoint.tensors):
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
    residual = embedding(g, ids)
    normed = norm(residual, "layers.0.attention_norm")
    for n in range(config.layers):
        layer = f"layers.{n}"
        qkv = linears[f"{layer}.qkv"](g, normed, f"{layer}.qkv")
        attended = attention(g, qkv, n, config, io, step)
        if n == config.layers - 1:  # from here on only the rows that get logits matter
            attended = _select_rows(g, attended, rows, config.heads * config.head_dim, "last.attended")
            residual = _select_rows(g, residual, rows, config.hidden, "last.residual")
        output = linears[f"{layer}.output"](g, attended, f"{layer}.output")
        normed, residual = add_norm(output, residual, f"{layer}.mlp_norm")
        gate_up = linears[f"{layer}.gate_up"](g, normed, f"{layer}.gate_up")
        hidden = swiglu(g, gate_up, config.intermediate, f"{layer}.mlp")
        down = linears[f"{layer}.down"](g, hidden, f"{layer}.down")
        following = "final_norm" if n == config.layers - 1 else f"layers.{n + 1}.attention_norm"
        normed, residual = add_norm(down, residual, following)
    logits = linears["head"](
        g, g.op("Squeeze", normed, g.constant("first_axis", np.array([0], np.int64)), name="rows"), "head"
    )
    g.output(logits, io.logits, ir.DataType.FLOAT, ("rows", config.vocabulary))
    return g


def _select_rows(g: GraphBuilder, x: ir.Value, rows: ir.Value, width: int, path: str) -> ir.Value:
    """(batch, tokens, width) → (1, rows, width)."""
    flat = g.op(
        "Reshape", x, g.constant(f"{path}.shape", np.array([1, -1, width], np.int64)), name=f"{path}.flat"
    )
    return g.op("Gather", flat, rows, name=path, axis=1)


def _read_config(config: Mapping[str, Any]) -> DecoderConfig:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(
            f"The config's hidden_act is {activation!r}; the llama family is built with 'silu'."
        )
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    head_dim = _positive(config, "head_dim", hidden // heads)
    kv_heads = _positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"The config has {heads} heads in {kv_heads} groups; the first must be a multiple."
        )
    if head_dim % 16:  # as ONNX Runtime's attention node asks
        raise UnsupportedModelError(f"The config's head_dim is {head_dim}; a multiple of 16 is expected.")
    context_length = _positive(config, "max_position_embeddings")
    window = context_length
    # As transformers has it: a llama has no window, whatever its config says.
    if config["model_type"] == "mistral":
        with_default = {"sliding_window": 4096, **config}
        if with_default["sliding_window"] is not None:
            window = _positive(with_default, "sliding_window")
    return DecoderConfig(
        family=str(config["model_type"]),
        layers=_positive(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=_positive(config, "vocab_size"),
        context_length=context_length,
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        inverse_frequencies=_inverse_frequencies(config, head_dim),
        sliding_window=window if window < context_length else None,
    )


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"The config's {key} is {value!r}; a positive whole number is expected.")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"The config's {key} is {value!r}; a positive number is expected.")
    return float(value)


def _inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Radians per token of each rotary pair (RoFormer, arXiv 2104.09864), stretched as the config asks."""
    # transformers 5 puts the base and the scaling into one object.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"The config's rope_scaling is {scaling!r}; an object or null is expected.")
    base = _number(scaling, "rope_theta", _number(config, "rope_theta", 10_000.0))
    frequencies = [base ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return tuple(frequencies)
    if kind == "linear":
        return tuple(frequency / _number(scaling, "factor") for frequency in frequencies)
    if kind == "factors":  # each pair's own divisor, as GGUF stores them
        factors: Sequence[float] = scaling["factors"]
        if len(factors) != len(frequencies):
            raise CheckpointError(f"rope_scaling has {len(factors)} factors, expected {len(frequencies)}.")
        return tuple(
            frequency / float(factor) for frequency, factor in zip(frequencies, factors, strict=True)
        )
    if kind == "llama3":
        return tuple(_llama3_frequency(frequency, scaling) for frequency in frequencies)
    raise UnsupportedModelError(
        f"The config's rope scaling is {kind!r}; supported are default, linear and llama3."
    )


def _llama3_frequency(frequency: float, scaling: Mapping[str, Any]) -> float:
    """Llama 3.1's stretch: long wavelengths fully, short ones not, a ramp between."""
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if not low < high:
        raise CheckpointError(
            f"The config's high_freq_factor is {high}; more than low_freq_factor ({low}) is due."
        )
    turns = _number(scaling, "original_max_position_embeddings") * frequency / (2 * math.pi)
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return share * frequency + (1 - share) * frequency / factor


class _CheckedTensors:
    """Tensors whose shapes are checked as they are read."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def read(self, name: str, shape: tuple[int, ...]) -> Array:
        try:
            tensor = self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"The checkpoint has no tensor {name}, which its config calls for."
            ) from None
        if tensor.shape != shape:
            raise CheckpointError(
                f"The tensor {name} has shape {tensor.shape}, the config calls for {shape}."
            )
        return tensor

    def packed(self, modules: Mapping[str, int], inputs: int) -> Linear:
        """One linear of several modules' outputs, in their order."""
        for module in modules:
            if f"{module}.weight" not in self._tensors:
                raise CheckpointError(
                    f"The checkpoint has no tensor {module}.weight, which its config calls for."
                )

        def weight() -> Array:
            parts = [self.read(f"{module}.weight", (outputs, inputs)) for module, outputs in modules.items()]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        bias: Array | None = None
        if any(f"{module}.bias" in self._tensors for module in modules):
            bias = np.concatenate(
                [
                    self.read(f"{module}.bias", (outputs,))
                    if f"{module}.bias" in self._tensors
                    else np.zeros(outputs, np.float32)
                    for module, outputs in modules.items()
                ]
            )
        return Linear(sum(modules.values()), inputs, weight, bias)
