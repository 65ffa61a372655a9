"""Tiny llama checkpoints as GGUF files and safetensors folders, sound ones and damaged ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Q
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pocketlm.hub import SourceFiles

Array = NDArray[np.float32]
PIECES = ["<unk>", "<s>", "</s>", *"▁abcdefgh", "ab", "▁a", "cd", "<|im_end|>"]

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": len(PIECES),
    "tie_word_embeddings": False,
}

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def source(path: Path, licence: str | None = None) -> SourceFiles:
    return SourceFiles(path, "tiny", "tests/tiny", "r1", licence)


def llama_tensors(config: Mapping[str, Any], *, biases: bool = False) -> dict[str, Array]:
    """Random weights under their Hugging Face names."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": normal(hidden),
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
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = normal(hidden)
        tensors[prefix + "post_attention_layernorm.weight"] = normal(hidden)
        for name, shape in linears.items():
            tensors[f"{prefix}{name}.weight"] = normal(*shape)
            if biases:
                tensors[f"{prefix}{name}.bias"] = normal(shape[0])
    return tensors


def gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(middle)]}.{kind}"


def permute(tensor: Array, heads: int) -> Array:
    """What llama.cpp's converter does to query and key rows (`LlamaModel.permute`), row by row."""
    rows = len(tensor) // heads
    permuted = np.empty_like(tensor)
    for head in range(heads):
        for i in range(rows // 2):
            for half in range(2):
                permuted[head * rows + 2 * i + half] = tensor[head * rows + half * (rows // 2) + i]
    return permuted


def stored_tensors(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Under their GGUF names and in GGUF's row order."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored = {}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        stored[gguf_name(name)] = permute(tensor, heads[part]) if part in heads else tensor
    return stored


def tokenizer_metadata() -> dict[str, Any]:
    """A small SentencePiece vocabulary."""
    types = [2, 3, 3] + [1] * (len(PIECES) - 4) + [3]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def llama_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        **tokenizer_metadata(),
    }


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Array],
    types: Mapping[str, Q] | None = None,
) -> Path:
    """With the library's own writer. A value of None leaves a key out; `types` quantizes tensors."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture") or "none")
    for key, value in metadata.items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        type_ = (types or {}).get(name, Q.F32)
        writer.add_tensor(name, gguf.quants.quantize(tensor, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_gguf(
    path: Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    metadata: Mapping[str, Any] | None = None,
    biases: bool = False,
    change: Mapping[str, Array | None] | None = None,
) -> dict[str, Array]:
    """Writes a whole model and returns its tensors under their Hugging Face names.

    `metadata` is merged into the sound one (None removes a key), `change` into the stored tensors.
    """
    tensors = llama_tensors(config, biases=biases)
    stored: dict[str, Array | None] = {**stored_tensors(config, tensors), **(change or {})}
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    write_gguf(path, {**llama_metadata(config), **(metadata or {})}, kept)
    return tensors


def text_bytes(text: str | bytes) -> bytes:
    """A string as GGUF stores it."""
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def raw_gguf(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[tuple[str, Sequence[int], int, int]] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    """A GGUF file byte by byte, false counts included. Tensors are (name, dimensions, type, offset)."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs)
    for name, dimensions, type_, offset in tensors:
        header += text_bytes(name) + struct.pack("<I", len(dimensions))
        header += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, type_, offset)
    return header + bytes(-len(header) % 32) + data


def tokenizer_json(*, added: Sequence[str] = ("<s>", "</s>", "<|im_end|>"), bos: str | None = None) -> str:
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [("a", "b"), ("c", "d")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    data = json.loads(tokenizer.to_str())
    if bos:
        special = {"id": bos, "ids": [tokenizer.token_to_id(bos)], "tokens": [bos]}
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: special},
        }
    return json.dumps(data)


_DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "I8": np.int8,
}


def safetensors_bytes(tensors: Mapping[str, Array], types: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file: eight bytes of header length, JSON, data."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        type_ = (types or {}).get(name, "F32")
        raw = tensor.astype(_DTYPES[type_]).tobytes()
        header[name] = {
            "dtype": type_,
            "shape": tensor.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def tiny_folder(folder: Path, files: Mapping[str, Any] | None = None) -> dict[str, Array]:
    """Writes a whole model and returns its tensors. `files` replaces contents (None leaves a file out)."""
    folder.mkdir(exist_ok=True)
    tensors = llama_tensors(CONFIG)
    contents: dict[str, Any] = {
        "config.json": {**CONFIG, "bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": tokenizer_json(),
        "model.safetensors": safetensors_bytes(tensors),
        **(files or {}),
    }
    for name, content in contents.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return tensors
