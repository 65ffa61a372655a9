"""Hidden states of every precision are those of transformers, even where the residual stream is rotated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import pocketlm
from helpers.tiny import (
    Array,
    dimensions_of,
    float_session,
    random_ids,
    read_weights,
    tiny_checkpoint,
    tokenizer_json,
)
from pocketlm.bundle import open_bundle
from pocketlm.manifest import read_manifest
from pocketlm.session import Session
from pocketlm.sources import SourceFiles
from pocketlm_exporters import texts
from pocketlm_exporters.export import export
from pocketlm_exporters.quantize.rotation import rotate

VOCABULARY = 320
LENGTHS = (1, 2, 40, 128, 129, 200)
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": None,
    "attn_implementation": "eager",
}
GEMMA3 = {"head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}


def llama(*, tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=tied))


def gemma3(*, tied: bool) -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, **GEMMA3, tie_word_embeddings=tied))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(tied=False),
    "llama, tied": lambda: llama(tied=True),
    "gemma3": lambda: gemma3(tied=False),
    "gemma3, tied": lambda: gemma3(tied=True),
}
LEAST_COSINE = {"fp32": 0.99999, "int8": 0.99, "int4": 0.7}


@dataclasses.dataclass(frozen=True)
class Case:
    source: SourceFiles
    texts: list[list[int]]
    states: list[Array]  # (tokens, hidden) by text


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(", ", "-"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.0 / parameter.shape[1] ** 0.5)
        ids = [random_ids(length, vocabulary=VOCABULARY, seed=length) for length in LENGTHS]
        states = [model.model(torch.tensor([each])).last_hidden_state[0].numpy() for each in ids]
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return Case(SourceFiles(folder, "tiny", "tests/tiny", None, None), ids, states)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_are_those_of_transformers(
    case: Case, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = texts.windows
    monkeypatch.setattr(texts, "windows", lambda *arguments: whole(*arguments)[:1])
    export(case.source, tmp_path / precision, precision=precision, max_kl=100.0)
    with pocketlm.load(tmp_path / precision, threads=1) as model:
        mean, last = (
            model.embed(case.texts, pooling=pooling, normalize=False).vectors for pooling in ("mean", "last")
        )
    for vector, states in zip(mean, case.states, strict=True):
        assert_alike(vector, states.mean(axis=0), LEAST_COSINE[precision])
    for vector, states in zip(last, case.states, strict=True):
        assert_alike(vector, states[-1], LEAST_COSINE[precision])


def assert_alike(found: Array, expected: Array, least_cosine: float) -> None:
    lengths = np.linalg.norm(found), np.linalg.norm(expected)
    assert found @ expected / np.prod(lengths) > least_cosine
    assert lengths[0] == pytest.approx(lengths[1], rel=min(0.2, 5 * (1 - least_cosine)))


def test_a_rotation_goes_before_what_the_checkpoint_does_itself(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    by_channel = np.random.default_rng(3).uniform(0.5, 2, 64).astype(np.float32)
    weights = dataclasses.replace(read_weights(checkpoint), hidden_map=by_channel)
    ids = random_ids(20)
    found = []
    for name, each in (("as it is", weights), ("rotated", rotate(weights))):
        session = float_session(checkpoint, each, tmp_path / name)
        found.append(session.hidden(ids, session.new_cache(20), range(20)).copy())
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    plain = float_session(checkpoint, read_weights(checkpoint), tmp_path / "plain")
    states = plain.hidden(ids, plain.new_cache(20), range(20))
    np.testing.assert_allclose(found[0], states * by_channel, atol=1e-4)


def test_the_manifest_names_them(int8_bundle: Path) -> None:
    graph = read_manifest(int8_bundle).graph
    assert (graph.hidden_rows, graph.hidden) == ("hidden_rows", "hidden")


def test_a_runtime_may_mix_rows(int8_bundle: Path) -> None:
    """The first rows as hidden states, the others as logits, in one pass; no pass of ours does."""
    bundle = open_bundle(int8_bundle)
    session = Session(bundle.graph_path, bundle.manifest.dimensions, bundle.manifest.graph, threads=1)
    ids = random_ids(9)
    logits = session.forward(ids, session.new_cache(9), range(9)).copy()
    states = session.hidden(ids, session.new_cache(9), range(9)).copy()
    of = bundle.manifest.dimensions
    empty = np.zeros((1, of.kv_heads, 9, of.head_dim), np.float32)
    feeds = {f"past_{part}.{layer}": empty for part in ("key", "value") for layer in range(of.layers)}
    feeds |= {
        "input_ids": np.array([ids]),
        "past_lengths": np.zeros(1, np.int32),
        "logit_rows": np.arange(9),
        "hidden_rows": np.array([4]),
    }
    some_logits, some_states = session._session.run(["logits", "hidden"], feeds)
    assert (some_logits == logits[4:]).all()
    np.testing.assert_allclose(some_states, states[:4], atol=1e-5)
    assert dimensions_of(read_weights(tiny_checkpoint())) == of
