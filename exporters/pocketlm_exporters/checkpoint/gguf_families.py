"""The decoder families of GGUF files: what each calls its tensors, and how it stores them.

Names and transformations are those of llama.cpp's converter (its `conversion` folder); what a family does
where the file says nothing is in its `src/models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import CheckpointError
from pocketlm_exporters.checkpoint.gguf_config import Hyperparameters, decoder_config
from pocketlm_exporters.checkpoint.gguf_file import GgufFile

_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_LOCAL_BASE, _SOFTCAP = "rope.freq_base_swa", "final_logit_softcapping"
# The one size whose queries are not scaled by the width of a head.
_GEMMA3_27B_LAYERS = 62


@dataclass(frozen=True)
class Family:
    """How the files of one `general.architecture` are read.

    `restore(name, tensor, config)` gives a stored tensor, by its Hugging Face name, the order and the values
    that Hugging Face has it with.
    """

    layer_tensors: Mapping[str, str]  # the file's name → Hugging Face's
    config: Callable[[GgufFile, str], dict[str, Any]]  # (file, where) → what a config.json says
    restore: Callable[[str, NDArray[np.float32], Mapping[str, Any]], NDArray[np.float32]]


def unpermute(tensor: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Query or key rows (or biases) back in Hugging Face's order: shape (heads × head_dim, …) in and out.

    llama.cpp rotates neighbouring rows 2i and 2i + 1 of a head, Hugging Face rows i and i + head_dim / 2;
    its converter therefore interleaves the halves of each head (`LlamaModel.permute`).
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


def _llama_config(file: GgufFile, where: str) -> dict[str, Any]:
    """The model type is "mistral" where there is a sliding window."""
    says = Hyperparameters(file, "llama", where)
    config = {"model_type": "llama", "hidden_act": "silu", **decoder_config(says, rope_base=10_000.0)}
    if file.metadata.get(f"llama.{_WINDOW}", int):
        config |= {"model_type": "mistral", "sliding_window": says.integer(_WINDOW)}
    return config


def _restore_llama(name: str, tensor: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    if ".q_proj." in name:
        return unpermute(tensor, config["num_attention_heads"])
    if ".k_proj." in name:
        return unpermute(tensor, config["num_key_value_heads"])
    return tensor


def _gemma3_config(file: GgufFile, where: str) -> dict[str, Any]:
    says = Hyperparameters(file, "gemma3", where, known=(_PATTERN, _LOCAL_BASE, _SOFTCAP))
    config = decoder_config(says)
    layers, hidden, heads = (
        config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    config |= {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "final_logit_softcapping": says.optional_number(_SOFTCAP),
        "rope_local_base_freq": says.number(_LOCAL_BASE, 10_000.0),
    }
    if not file.metadata.get(f"gemma3.{_WINDOW}", int):
        return config | {"sliding_window_pattern": 1}  # each layer sees everything
    config["sliding_window"] = says.integer(_WINDOW)
    local = says.flags(_PATTERN)
    if local is None:
        return config | {"sliding_window_pattern": says.integer(_PATTERN, 6)}
    if len(local) != layers:
        raise CheckpointError(
            f"{where}: gemma3.{_PATTERN} has {len(local)} flags, expected one for each of {layers} layers. "
            "The file is damaged: fetch it again."
        )
    return config | {"layer_types": ["sliding_attention" if each else "full_attention" for each in local]}


def _restore_gemma3(name: str, tensor: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """The converter adds the one that Gemma's norms add to their weights."""
    return tensor - np.float32(1) if name.endswith("norm.weight") else tensor


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        {**_LINEARS, "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        _llama_config,
        _restore_llama,
    ),
    "gemma3": Family(
        {
            **_LINEARS,
            "attn_norm": "input_layernorm",
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        _gemma3_config,
        _restore_gemma3,
    ),
}
"""By `general.architecture` (Mistral's files say "llama" too)."""
