"""The fp32 graph computes what transformers' own implementation computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from helpers.tiny import Array, float_session, random_ids, read_weights, run, tokenizer_json
from pocketlm.session import Session
from pocketlm.sources import SourceFiles
from pocketlm_exporters.checkpoint import open_checkpoint

TOKENS = 80
VOCABULARY = 320

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(**config: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**COMMON | config))


def mistral(**config: Any) -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**COMMON | config))


def gemma3(**config: Any) -> Gemma3ForCausalLM:
    defaults = {"head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}
    return Gemma3ForCausalLM(Gemma3TextConfig(**COMMON | {"tie_word_embeddings": True} | defaults | config))


MODELS: dict[str, Callable[[], Any]] = {
    "multi-head, tied": lambda: llama(num_key_value_heads=4, tie_word_embeddings=True),
    "grouped heads, untied": llama,
    "one key head for all": lambda: llama(num_key_value_heads=1),
    "llama3 rope scaling": lambda: llama(rope_theta=500.0, rope_scaling=LLAMA3),
    "linear rope scaling": lambda: llama(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "biases everywhere": lambda: llama(attention_bias=True, mlp_bias=True),
    "explicit head_dim": lambda: llama(head_dim=32, rms_norm_eps=1e-2),
    "mistral": lambda: mistral(sliding_window=None),
    "mistral, sliding window": lambda: mistral(sliding_window=7),
    "mistral, window of one": lambda: mistral(sliding_window=1),
    "gemma3": gemma3,
    "gemma3, one key head, untied": lambda: gemma3(num_key_value_heads=1, tie_word_embeddings=False),
    "gemma3, listed layers": lambda: gemma3(layer_types=["full_attention"] + 2 * ["sliding_attention"]),
    "gemma3, all global": lambda: gemma3(layer_types=3 * ["full_attention"], attention_bias=True),
    "gemma3, linear rope scaling": lambda: gemma3(
        rope_theta=500.0, rope_local_base_freq=50.0, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
}


class Pair:
    """The same weights in transformers and in our graph."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.ids = random_ids(TOKENS, vocabulary=VOCABULARY)
        with torch.no_grad():
            self.expected: Array = model.eval()(torch.tensor([self.ids])).logits[0].numpy()
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        checkpoint = open_checkpoint(SourceFiles(folder, "tiny", "tests/tiny", None, None))
        self.session: Session = float_session(checkpoint, read_weights(checkpoint), folder / "graph")


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms that are all one and biases that are all zero would hide their absence.
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return Pair(model, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(
    "sizes", [[TOKENS], [32], [1, 13, 30], [1]], ids=["one pass", "chunks", "uneven chunks", "token by token"]
)
def test_logits_are_those_of_transformers(pair: Pair, sizes: list[int]) -> None:
    assert np.ptp(pair.expected) > 1  # something to differ in
    assert np.abs(run(pair.session, pair.ids, sizes) - pair.expected).max() < 1e-4
