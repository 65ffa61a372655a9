"""Tensors that are read when they are asked for, and the shapes a decoder must have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import CheckpointError

Shape = tuple[int, ...]

_BLOCK_NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gemma3": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
_HEAD_NORMS = {"llama": (), "gemma3": ("self_attn.q_norm", "self_attn.k_norm")}


class MissingTensorError(CheckpointError, KeyError):
    """A name that the checkpoint does not hold; a KeyError too, as `Mapping` promises."""

    __str__ = Exception.__str__  # KeyError's shows the message in quotes


class LazyTensors(Mapping[str, NDArray[np.float32]]):
    """Reads a tensor anew each time it is asked for; nothing is kept.

    `shapes` are known without reading. Arrays may be read-only views of the file. Raises
    MissingTensorError for an unknown name, and CheckpointError for a tensor that is not finite: weights
    with a NaN or an infinity are damaged.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], read: Callable[[str], NDArray[np.float32]], where: str
    ) -> None:
        self.shapes = shapes
        self._read = read
        self._where = where

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self.shapes:
            raise MissingTensorError(
                f"{self._where} has no tensor {name} among its {len(self.shapes)}. Either the checkpoint is "
                "incomplete (fetch it again), or its architecture is a variant that pocketlm has no code for."
            )
        tensor = self._read(name)
        # The extremes of a tensor carry its NaNs and infinities, at the cost of reading it twice.
        if tensor.size and not (np.isfinite(tensor.min()) and np.isfinite(tensor.max())):
            raise CheckpointError(
                f"{self._where}: the tensor {name} holds NaN or infinity: the weights are damaged. "
                "Fetch the model again, or take another file of it."
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # without reading it, as Mapping would

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def stored_types(types: Iterator[str]) -> str:
    """How often each occurs, the most frequent first: "Q4_1 × 210, F32 × 61"."""
    counts = Counter(types).items()
    return ", ".join(
        f"{name} × {count}" for name, count in sorted(counts, key=lambda item: (-item[1], item[0]))
    )


def check_decoder_shapes(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> None:
    """Checks that a decoder of a known family is complete and its tensors fit `config`.

    Biases may be absent, and so may the head where the embedding is tied. Tensors beyond those of the
    decoder are none of this function's business. Raises CheckpointError.
    """
    for name, expected in _decoder_shapes(config, where):
        optional = name.endswith(".bias") or (name == "lm_head.weight" and config.get("tie_word_embeddings"))
        if name not in shapes:
            if optional:
                continue
            some = ", ".join(islice(shapes, 3)) or "nothing"
            raise MissingTensorError(
                f"{where} has no tensor {name}, which a {config['model_type']} model needs. It holds "
                f"{len(shapes)} tensors ({some}, …). The checkpoint is incomplete: fetch it again."
            )
        if shapes[name] != expected:
            raise CheckpointError(
                f"{where}: the tensor {name} has the shape {shapes[name]}, expected {expected} "
                "from the configuration. Tensors and configuration are not of the same model."
            )


def _decoder_shapes(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, Shape]]:
    """Lazily: a configuration that claims a billion layers fails at the first one that is missing."""

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise CheckpointError(
                f"{where}: {key} is {value!r} in the configuration, expected a positive integer."
            )
        return value

    family = "gemma3" if config["model_type"] == "gemma3_text" else "llama"
    hidden, inner, heads = size("hidden_size"), size("intermediate_size"), size("num_attention_heads")
    head_dim = size("head_dim", max(1, hidden // heads))
    queries, keys = heads * head_dim, size("num_key_value_heads", heads) * head_dim
    yield "model.embed_tokens.weight", (size("vocab_size"), hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (size("vocab_size"), hidden)
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(size("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        for name in _BLOCK_NORMS[family]:
            yield f"{prefix}.{name}.weight", (hidden,)
        for name in _HEAD_NORMS[family]:
            yield f"{prefix}.{name}.weight", (head_dim,)
        for name, (outputs, inputs) in linears.items():
            yield f"{prefix}.{name}.weight", (outputs, inputs)
            yield f"{prefix}.{name}.bias", (outputs,)
