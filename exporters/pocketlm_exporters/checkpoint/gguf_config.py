"""What a GGUF file's metadata says about a decoder, as a Hugging Face configuration.

The keys are those of <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> and of llama.cpp's
converter. Whatever a file says about its decoder that this module does not know is refused: it may
change what the weights mean.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.checkpoint.gguf_file import GgufFile

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Keys below the architecture's name that are read, and those that change nothing for a plain decoder.
_READ_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_HARMLESS_KEYS = {
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.layer_norm_epsilon",
    "pooling_type",
}
# Keys that change nothing as long as they have this value.
_NEUTRAL_VALUES = {
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
}


def decoder_config(says: Hyperparameters, rope_base: float | None = None) -> dict[str, Any]:
    """What the configurations of all families have, under the keys of a `config.json`.

    `rope_base` is what a file means that names none. Raises CheckpointError for a missing or impossible
    value, UnsupportedModelError for one that pocketlm has no code for.
    """
    file, where = says.file, says.where
    if EMBEDDING not in file.entries:
        raise CheckpointError(
            f"{where} has no tensor {EMBEDDING}: it holds a vocabulary only, or is incomplete. "
            "Fetch it again, or take another file of the model."
        )
    heads, hidden = says.integer("attention.head_count"), says.integer("embedding_length")
    head_dim = says.integer("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if says.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{where}: {says.architecture}.{key} is {says.integer(key)}, but a key is {head_dim} wide. "
                "pocketlm has no code for decoders where the two differ."
            )
    if head_dim % 2:
        raise CheckpointError(
            f"{where}: heads are {head_dim} wide, expected an even number for rotary pairs. "
            "The file is damaged: fetch it again."
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": says.integer("feed_forward_length"),
        "num_hidden_layers": says.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": says.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        # The key vocab_size is optional; the embedding cannot be wrong about it.
        "vocab_size": file.entries[EMBEDDING].shape[0],
        "max_position_embeddings": says.integer("context_length"),
        "rms_norm_eps": says.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": says.number("rope.freq_base", rope_base),
        "rope_scaling": _rope_scaling(says, head_dim),
        "tie_word_embeddings": HEAD not in file.entries,
        "attention_bias": _has_bias(file, ("attn_q", "attn_k", "attn_v", "attn_output")),
        "mlp_bias": _has_bias(file, ("ffn_gate", "ffn_up", "ffn_down")),
    }


class Hyperparameters:
    """Values below the architecture's name, checked.

    Raises UnsupportedModelError for a key that neither all families have nor is among the `known` ones.
    """

    def __init__(self, file: GgufFile, architecture: str, where: str, *, known: Collection[str] = ()) -> None:
        self.file = file
        self.architecture = architecture
        self.where = where
        self._metadata = file.metadata
        self._refuse_unknown({*known, *_READ_KEYS, *_HARMLESS_KEYS})

    def _refuse_unknown(self, known: Collection[str]) -> None:
        for key, value in self._metadata.values.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name == key or name in known:
                continue
            if type(value) is not type(_NEUTRAL_VALUES.get(name)) or value != _NEUTRAL_VALUES[name]:
                raise UnsupportedModelError(
                    f"{self.where} says {key} = {value!r:.99}, which pocketlm has no code for. "
                    "It may change what the weights mean, so the model is not read."
                )

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._metadata.values

    def text(self, key: str) -> str | None:
        return self._metadata.get(f"{self.architecture}.{key}", str)

    def flags(self, key: str) -> list[bool] | None:
        """One flag a layer, or None if they are not stored as such."""
        values = self._metadata.values.get(f"{self.architecture}.{key}")
        if not isinstance(values, np.ndarray) or values.dtype != np.bool_:
            return None
        flags: list[bool] = values.tolist()
        return flags

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer, which may also be stored once a layer."""
        key = f"{self.architecture}.{key}"
        if isinstance(self._metadata.values.get(key), np.ndarray):
            value = self._same_for_all_layers(key)
        elif default is None or key in self._metadata.values:
            value = self._metadata.require(key, int)
        else:
            value = default
        if not 0 < value < 2**31:
            raise CheckpointError(f"{self.where}: {key} is {value}, expected a positive 32-bit integer.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as short as its float32 can be written: 1e-05, not 9.99999974e-06."""
        value = self.optional_number(key)
        if value is None:
            value = (
                self._metadata.require(f"{self.architecture}.{key}", float) if default is None else default
            )
        return value

    def optional_number(self, key: str) -> float | None:
        value = self._metadata.get(f"{self.architecture}.{key}", float)
        if value is None:
            return None
        with np.errstate(over="ignore"):
            rounded = float(str(np.float32(value)))
        if not 0 < rounded < float("inf"):
            raise CheckpointError(
                f"{self.where}: {self.architecture}.{key} is {value}, expected a positive number."
            )
        return rounded

    def _same_for_all_layers(self, key: str) -> int:
        values = np.unique(self._metadata.values[key])
        if len(values) != 1 or values.dtype.kind not in "iu":
            raise UnsupportedModelError(
                f"{self.where}: {key} is {values[:9].tolist()} over the layers, expected one integer "
                "for all. pocketlm has no code for decoders whose layers differ."
            )
        return int(values[0])


def _rope_scaling(says: Hyperparameters, head_dim: int) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`. Llama 3's kind is stored as what came of it: {"rope_type": "factors",
    "factors": head_dim / 2 divisors of the rotary frequencies}."""
    kind = says.text("rope.scaling.type")
    factor = says.optional_number("rope.scaling.factor")
    if kind is None:  # as old files have it
        factor = says.optional_number("rope.scale_linear") if factor is None else factor
        kind = "none" if factor in (None, 1.0) else "linear"
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": says.number("rope.scaling.factor", factor)}
    elif kind == "yarn":
        scaling = _yarn(says)
    elif kind != "none":
        raise UnsupportedModelError(
            f"{says.where}: {says.architecture}.rope.scaling.type is {kind!r:.99}; "
            "pocketlm reads none, linear and yarn."
        )
    factors = _rope_factors(says, head_dim)
    if factors is None:
        return scaling
    if scaling is not None:
        raise UnsupportedModelError(
            f"{says.where} scales rotary frequencies twice, by {kind} and by {ROPE_FACTORS}; "
            "expected one of them."
        )
    return {"rope_type": "factors", "factors": factors}


def _yarn(says: Hyperparameters) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": says.number("rope.scaling.factor")}
    if says.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = says.integer("rope.scaling.original_context_length")
    names = {
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    for key, name in names.items():
        value = says.optional_number(f"rope.scaling.{key}")
        if value is not None:
            scaling[name] = value
    return scaling


def _rope_factors(says: Hyperparameters, head_dim: int) -> list[float] | None:
    if ROPE_FACTORS not in says.file.entries:
        return None
    factors = says.file.read(ROPE_FACTORS)
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(
            f"{says.where}: {ROPE_FACTORS} has the shape {factors.shape}, expected {head_dim // 2} positive "
            "divisors. The file is damaged: fetch it again."
        )
    return None if (factors == 1).all() else [float(factor) for factor in factors]


def _has_bias(file: GgufFile, names: tuple[str, ...]) -> bool:
    return any(f"blk.0.{name}.bias" in file.entries for name in names)
