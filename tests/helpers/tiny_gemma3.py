"""A tiny Gemma 3 with random weights, as a checkpoint and as a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.checkpoints import GGUF_NAMES, PIECES, tokenizer_metadata, write_gguf
from helpers.tiny import END_OF_TEXT, IM_END, TEMPLATE, VOCABULARY, Array, tokenizer_json
from pocketlm.manifest import Source, Tokens
from pocketlm_exporters.checkpoint import Checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 512,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}
BLOCK_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def gemma3_tensors(config: Mapping[str, Any]) -> dict[str, Array]:
    """Under their Hugging Face names; norms are what is added to one."""
    random = np.random.default_rng(0)
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))

    def normal(outputs: int, inputs: int) -> Array:
        return (random.standard_normal((outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)

    def norm(width: int) -> Array:
        return random.uniform(-0.5, 0.5, width).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": norm(hidden),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden)
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": norm(hidden) for name in BLOCK_NORMS}
        tensors |= {f"{prefix}.{name}.weight": norm(head_dim) for name in HEAD_NORMS}
        tensors |= {f"{prefix}.{name}.weight": normal(*shape) for name, shape in linears.items()}
    return tensors


def gemma3_checkpoint(*, change: Mapping[str, Array | None] | None = None, **config: Any) -> Checkpoint:
    """`config` replaces values of CONFIG (None removes one), `change` tensors."""
    merged = {**CONFIG, **config}
    tensors = {**gemma3_tensors({**CONFIG, **config}), **(change or {})}
    return Checkpoint(
        name="tiny",
        config={key: value for key, value in merged.items() if value is not None},
        tensors={name: tensor for name, tensor in tensors.items() if tensor is not None},
        tokenizer_json=tokenizer_json(),
        chat_template=TEMPLATE,
        tokens=Tokens(bos=None, eos=(END_OF_TEXT, IM_END), add_bos=False),
        source=Source("safetensors", "tests/tiny", None, "0" * 64, f"F32 × {len(tensors)}"),
        licence="Gemma",
    )


GGUF_CONFIG = {**CONFIG, "vocab_size": len(PIECES)}
_GGUF_NAMES = {
    **GGUF_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def gemma3_gguf(
    path: Path, metadata: Mapping[str, Any] | None = None, change: Mapping[str, Array | None] | None = None
) -> dict[str, Array]:
    """Writes a whole model as llama.cpp's converter does; returns its tensors by their Hugging Face names.

    `metadata` is merged into the sound one (None removes a key), `change` into the stored tensors.
    """
    config, tensors = GGUF_CONFIG, gemma3_tensors(GGUF_CONFIG)
    stored: dict[str, Array | None] = {}
    for name, tensor in tensors.items():
        stored[_gguf_name(name)] = tensor + np.float32(1) if name.endswith("norm.weight") else tensor
    facts = {
        "general.architecture": "gemma3",
        "gemma3.block_count": config["num_hidden_layers"],
        "gemma3.context_length": config["max_position_embeddings"],
        "gemma3.embedding_length": config["hidden_size"],
        "gemma3.feed_forward_length": config["intermediate_size"],
        "gemma3.attention.head_count": config["num_attention_heads"],
        "gemma3.attention.head_count_kv": config["num_key_value_heads"],
        "gemma3.attention.key_length": config["head_dim"],
        "gemma3.attention.value_length": config["head_dim"],
        "gemma3.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "gemma3.attention.sliding_window": config["sliding_window"],
        "gemma3.rope.freq_base": config["rope_theta"],
        **tokenizer_metadata(),
        "tokenizer.ggml.add_space_prefix": False,
    }
    kept = {name: tensor for name, tensor in {**stored, **(change or {})}.items() if tensor is not None}
    write_gguf(path, {**facts, **(metadata or {})}, kept)
    return tensors


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{_GGUF_NAMES['.'.join(middle)]}.{kind}"
