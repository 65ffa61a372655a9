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
from pocketlm_exporters.checkpoint.gguf_config import EMBEDDING, HEAD, ROPE_FACTORS
from pocketlm_exporters.checkpoint.gguf_families import FAMILIES
from pocketlm_exporters.checkpoint.gguf_file import GgufFile, Metadata
from pocketlm_exporters.checkpoint.gguf_tokenizer import read_tokenizer
from pocketlm_exporters.checkpoint.tensors import LazyTensors, check_decoder_shapes, stored_types
from pocketlm_exporters.checkpoint.types import Checkpoint

_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")


def open_gguf(source: SourceFiles, *, progress: Progress = silent) -> Checkpoint:
    """The GGUF file at `source.path` as a checkpoint.

    Raises CheckpointError for a damaged or incomplete file, UnsupportedModelError for an architecture,
    tensor type, tokenizer or variant that pocketlm has no code for.
    """
    file = GgufFile(source.path)
    where = str(source.path)
    architecture = _architecture(file.metadata, where)
    family = FAMILIES[architecture]
    names = _huggingface_names(file, architecture, where)
    config = family.config(file, where)
    shapes = {name: file.entries[stored].shape for name, stored in names.items()}
    check_decoder_shapes(config, shapes, where)
    layers = config["num_hidden_layers"]
    if f"model.layers.{layers}.input_layernorm.weight" in shapes:
        raise CheckpointError(
            f"{where} holds more layers than the {layers} that {architecture}.block_count says. "
            "The file is damaged: fetch it again."
        )
    tokenizer = read_tokenizer(file.metadata, where)
    if tokenizer.size > config["vocab_size"]:
        raise CheckpointError(
            f"{where} has {tokenizer.size:,} tokens, but an embedding for {config['vocab_size']:,} only. "
            "Tokenizer and weights are not of the same model."
        )

    def read(name: str) -> NDArray[np.float32]:
        return family.restore(name, file.read(names[name]), config)

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


def _architecture(metadata: Metadata, where: str) -> str:
    """The file's architecture, one of FAMILIES."""
    architecture = metadata.require("general.architecture", str)
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"{where} holds a model of the architecture {architecture!r:.99}."
            f"{did_you_mean(architecture, FAMILIES)} "
            f"From GGUF files pocketlm reads: {', '.join(FAMILIES)}."
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
    return architecture


def _huggingface_names(file: GgufFile, architecture: str, where: str) -> dict[str, str]:
    """Hugging Face name → the file's name, for all tensors but the rotary factors."""
    layer_tensors = FAMILIES[architecture].layer_tensors
    names = {}
    for stored in file.entries:
        if stored == ROPE_FACTORS:
            continue
        match = _LAYER_TENSOR.fullmatch(stored)
        if match and match[2] in layer_tensors:
            names[f"model.layers.{match[1]}.{layer_tensors[match[2]]}.{match[3]}"] = stored
        elif stored in _TENSORS:
            names[_TENSORS[stored]] = stored
        else:
            raise UnsupportedModelError(
                f"{where} has the tensor {stored[:99]!r}, which is not part of the {architecture} "
                "architecture. It is a variant that pocketlm has no code for."
            )
    return names
