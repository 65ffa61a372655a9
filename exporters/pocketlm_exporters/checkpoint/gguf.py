"""GGUF files as checkpoints: tensors under their Hugging Face names and in Hugging Face's row order.

The names are those of <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import CheckpointError, UnsupportedModelError, did_you_mean
from pocketlm.files import sha256_of
from pocketlm.hub import SourceFiles
from pocketlm.manifest import Source
from pocketlm.progress import Progress, silent
from pocketlm_exporters.checkpoint.gguf_config import EMBEDDING, HEAD, ROPE_FACTORS, llama_config
from pocketlm_exporters.checkpoint.gguf_file import GgufFile, Metadata
from pocketlm_exporters.checkpoint.gguf_tokenizer import read_tokenizer
from pocketlm_exporters.checkpoint.tensors import LazyTensors, check_llama_shapes, stored_types
from pocketlm_exporters.checkpoint.types import Checkpoint

ARCHITECTURES = ("llama",)
"""Values of `general.architecture` that have a mapping here (Mistral's files say "llama" too)."""

_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")


def open_gguf(source: SourceFiles, *, progress: Progress = silent) -> Checkpoint:
    """The GGUF file at `source.path` as a checkpoint.

    Raises CheckpointError for a damaged or incomplete file, UnsupportedModelError for an architecture,
    tensor type, tokenizer or variant that pocketlm has no code for.
    """
    file = GgufFile(source.path)
    where = str(source.path)
    _check_kind(file.metadata, where)
    names = _huggingface_names(file, where)
    config = llama_config(file, where)
    shapes = {name: file.entries[stored].shape for name, stored in names.items()}
    check_llama_shapes(config, shapes, where)
    layers = config["num_hidden_layers"]
    if f"model.layers.{layers}.input_layernorm.weight" in shapes:
        raise CheckpointError(
            f"{where} holds more layers than the {layers} that llama.block_count says. "
            "The file is damaged: fetch it again."
        )
    tokenizer = read_tokenizer(file.metadata, where)
    if tokenizer.size > config["vocab_size"]:
        raise CheckpointError(
            f"{where} has {tokenizer.size:,} tokens, but an embedding for {config['vocab_size']:,} only. "
            "Tokenizer and weights are not of the same model."
        )

    def read(name: str) -> NDArray[np.float32]:
        tensor = file.read(names[name])
        if ".q_proj." in name:
            return unpermute(tensor, config["num_attention_heads"])
        if ".k_proj." in name:
            return unpermute(tensor, config["num_key_value_heads"])
        return tensor

    return Checkpoint(
        name=source.name,
        config=config,
        tensors=LazyTensors(shapes, read, where),
        tokenizer_json=tokenizer.json,
        chat_template=tokenizer.chat_template,
        tokens=tokenizer.tokens,
        source=Source(
            kind="gguf",
            location=source.location,
            revision=source.revision,
            sha256=sha256_of(source.path, progress=progress),
            format=stored_types(entry.type.name for entry in file.entries.values()),
        ),
        licence=source.licence or file.metadata.get("general.license", str),
    )


def unpermute(tensor: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Query or key rows (or biases) back in Hugging Face's order: shape (heads × head_dim, …) in and out.

    llama.cpp rotates neighbouring rows 2i and 2i + 1 of a head, Hugging Face rows i and i + head_dim / 2;
    its converter therefore interleaves the halves of each head (`LlamaModel.permute`).
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


def _check_kind(metadata: Metadata, where: str) -> None:
    architecture = metadata.require("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where} holds a model of the architecture {architecture!r:.99}."
            f"{did_you_mean(architecture, ARCHITECTURES)} "
            f"From GGUF files pocketlm reads: {', '.join(ARCHITECTURES)}."
        )
    kind = metadata.get("general.type", str)
    if kind not in (None, "model"):
        raise UnsupportedModelError(f"{where} holds a GGUF of type {kind!r}, expected 'model'.")
    parts = metadata.get("split.count", int)
    if parts is not None and parts > 1:
        raise UnsupportedModelError(
            f"{where} is one of {parts} parts of a split model. "
            "Merge them with llama-gguf-split --merge first."
        )


def _huggingface_names(file: GgufFile, where: str) -> dict[str, str]:
    """Hugging Face name → the file's name, for all tensors but the rotary factors."""
    names = {}
    for stored in file.entries:
        if stored == ROPE_FACTORS:
            continue
        match = _LAYER_TENSOR.fullmatch(stored)
        if match and match[2] in _LAYER_TENSORS:
            names[f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"] = stored
        elif stored in _TENSORS:
            names[_TENSORS[stored]] = stored
        else:
            raise UnsupportedModelError(
                f"{where} has the tensor {stored[:99]!r}, which is not part of the llama architecture. "
                "It is a variant that pocketlm has no code for."
            )
    return names
