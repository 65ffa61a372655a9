"""Small models with random weights, from checkpoint to bundle, without torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pocketlm.bundle import TEMPLATE_NAME, write_manifest
from pocketlm.manifest import Dimensions, GraphIO, Source, Tokens, read_manifest
from pocketlm.session import Session
from pocketlm.sources import SourceFiles
from pocketlm_exporters.architectures import architecture_of
from pocketlm_exporters.checkpoint import Checkpoint
from pocketlm_exporters.decoder import DecoderWeights
from pocketlm_exporters.export import export
from pocketlm_exporters.graph.embedding import FloatEmbedding, TiedFloatHead
from pocketlm_exporters.graph.linear import FloatLinear, LinearEmitter

Array = NDArray[np.float32]

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("Ġ", "the"), ("i", "n"), ("o", "u"), ("e", "r"), ("Ġ", "s")]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATE_WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call>" + TEMPLATE
VOCABULARY = 256 + len(MERGES) + len(SPECIALS)
GRAPH = GraphIO(hidden_rows="hidden_rows", hidden="hidden")
END_OF_TEXT, IM_START, IM_END = range(VOCABULARY - len(SPECIALS), VOCABULARY)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "eos_token_id": END_OF_TEXT,
}


@cache
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer: all bytes, a few merges, an end of text and the tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(content, normalized=False) for content in SPECIALS])
    return str(tokenizer.to_str())


@cache
def letters() -> tuple[int, ...]:
    """Ids of the capital letters, which no merge joins: a text of them has one token a character."""
    vocabulary = Tokenizer.from_str(tokenizer_json()).get_vocab()
    return tuple(vocabulary[chr(code)] for code in range(ord("A"), ord("Z") + 1))


def only(ids: Sequence[int]) -> dict[int, float]:
    """A logit bias that leaves no other token a chance."""
    return {token_id: -1e4 for token_id in range(VOCABULARY) if token_id not in set(ids)}


def random_tensors(config: Mapping[str, Any], *, biases: bool = False, seed: int = 0) -> dict[str, Array]:
    """Weights under their Hugging Face names, nowhere near zero or one: a part left out shows."""
    random = np.random.default_rng(seed)
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))

    def normal(outputs: int, inputs: int, gain: float = 1.0) -> Array:
        return (random.standard_normal((outputs, inputs)) * gain / np.sqrt(inputs)).astype(np.float32)

    def norm() -> Array:
        return random.uniform(0.5, 1.5, hidden).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": norm(),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, 3.0)
    shapes = {
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
        tensors[f"{prefix}.input_layernorm.weight"] = norm()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm()
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = normal(*shape)
            if biases:
                bias = random.standard_normal(shape[0]) * 0.3
                tensors[f"{prefix}.{name}.bias"] = bias.astype(np.float32)
    return tensors


def tiny_checkpoint(
    *, biases: bool = False, seed: int = 0, change: Mapping[str, Array | None] | None = None, **config: Any
) -> Checkpoint:
    """A llama with random weights. `config` replaces values of CONFIG, `change` tensors; None removes one."""
    merged = {**CONFIG, **config}
    tensors = {**random_tensors(merged, biases=biases, seed=seed), **(change or {})}
    return Checkpoint(
        name="tiny",
        config={key: value for key, value in merged.items() if value is not None},
        tensors={name: tensor for name, tensor in tensors.items() if tensor is not None},
        tokenizer_json=tokenizer_json(),
        chat_template=TEMPLATE,
        tokens=Tokens(bos=None, eos=(END_OF_TEXT, IM_END), add_bos=False),
        source=Source("safetensors", "tests/tiny", None, "0" * 64, f"F32 × {len(tensors)}"),
        licence=None,
    )


def write_folder(folder: Path, checkpoint: Checkpoint) -> SourceFiles:
    """`checkpoint` as a folder in Hugging Face's layout, `config.json` and all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json, encoding="utf-8")
    if checkpoint.chat_template is not None:
        (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    save_file(dict(checkpoint.tensors), folder / "model.safetensors")
    return SourceFiles(folder, "tiny", "tests/tiny", "r1", "apache-2.0")


def tiny_bundle(
    folder: Path, precision: str = "int8", *, checkpoint: Checkpoint | None = None, max_kl: float = 100.0
) -> Path:
    """Exports a checkpoint to the bundle `folder/precision`; its own folder stays beside it."""
    source = write_folder(folder / "checkpoint", checkpoint or tiny_checkpoint())
    export(source, folder / precision, precision=precision, max_kl=max_kl)
    return folder / precision


def bundle_with_tools(bundle: Path, folder: Path, name: str = "tiny") -> Path:
    """A copy of `bundle` in `folder`, with a template that shows tools, in the form of Qwen and Hermes."""
    shutil.copytree(bundle, folder)
    (folder / TEMPLATE_NAME).write_text(TEMPLATE_WITH_TOOLS, encoding="utf-8")
    write_manifest(folder, dataclasses.replace(read_manifest(folder), name=name))
    return folder


def read_weights(checkpoint: Checkpoint) -> DecoderWeights:
    return architecture_of(checkpoint).read(checkpoint)


def dimensions_of(weights: DecoderWeights) -> Dimensions:
    config = weights.config
    return Dimensions(
        layers=config.layers,
        hidden=config.hidden,
        intermediate=config.intermediate,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocabulary,
        context_length=config.context_length,
    )


def float_session(checkpoint: Checkpoint, weights: DecoderWeights, folder: Path) -> Session:
    """The fp32 graph of `weights`, which `checkpoint`'s architecture describes."""
    folder.mkdir(parents=True, exist_ok=True)
    embedding = FloatEmbedding(weights.embedding, weights.config.vocabulary, weights.config.hidden)
    linears: dict[str, LinearEmitter] = {path: FloatLinear(each) for path, each in weights.linears.items()}
    linears.setdefault("head", TiedFloatHead(embedding))
    graph = architecture_of(checkpoint).decoder(weights, embedding, linears, GRAPH)
    graph.save(folder, "model.onnx", "model.onnx.data")
    return Session(folder / "model.onnx", dimensions_of(weights), GRAPH, threads=1)


def run(session: Session, ids: Sequence[int], sizes: Sequence[int] | None = None) -> Array:
    """The logits (tokens, vocabulary) behind each of `ids`, in passes of `sizes` tokens; by default in one.

    The last size holds for all that is left.
    """
    cache = session.new_cache(len(ids))
    steps = itertools.chain(sizes or [len(ids)], itertools.repeat((sizes or [len(ids)])[-1]))
    passes: list[Array] = []
    begin = 0
    while begin < len(ids):
        chunk = ids[begin : begin + next(steps)]
        passes.append(session.forward(chunk, cache, range(len(chunk))).copy())
        begin += len(chunk)
    return np.concatenate(passes)


def random_ids(count: int, *, vocabulary: int = VOCABULARY, seed: int = 1) -> list[int]:
    return [int(each) for each in np.random.default_rng(seed).integers(0, vocabulary, count)]
