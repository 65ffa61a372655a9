"""Statistics of activations against slow references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import Array, random_ids, read_weights, tiny_checkpoint
from pocketlm.manifest import GraphIO
from pocketlm_exporters.architectures import llama
from pocketlm_exporters.calibrate import ActivationStatistics, calibrate
from pocketlm_exporters.decoder import DecoderWeights
from pocketlm_exporters.graph.embedding import FloatEmbedding, TiedFloatHead
from pocketlm_exporters.graph.linear import FloatLinear, LinearEmitter, TappedLinear

WINDOWS = [random_ids(30, seed=1), random_ids(30, seed=2), random_ids(7, seed=3), random_ids(1, seed=4)]


def tapped_graph(weights: DecoderWeights, folder: Path) -> Path:
    config = weights.config
    embedding = FloatEmbedding(weights.embedding, config.vocabulary, config.hidden)
    linears: dict[str, LinearEmitter] = {
        path: TappedLinear(FloatLinear(linear), linear.inputs) for path, linear in weights.linears.items()
    }
    linears.setdefault("head", TiedFloatHead(embedding))
    llama.decoder(weights, embedding, linears, GraphIO()).save(folder, "model.onnx", "model.onnx.data")
    return folder / "model.onnx"


def slow_inputs(weights: DecoderWeights, ids: list[int]) -> dict[str, Array]:
    """Each linear's input (tokens, inputs) for a sequence, in float64 and without a cache."""
    config, linears = weights.config, weights.linears
    positions = np.outer(np.arange(len(ids)), config.attention[0].inverse_frequencies)
    cosines, sines = np.cos(positions)[:, None], np.sin(positions)[:, None]
    inputs: dict[str, Array] = {}

    def apply(path: str, x: Array) -> Array:
        inputs[path] = x
        bias = linears[path].bias
        result: Array = x @ linears[path].weight().T + (0 if bias is None else bias)
        return result

    def norm(x: Array, path: str) -> Array:
        mean_square = np.square(x).mean(axis=-1, keepdims=True)
        normed: Array = x / np.sqrt(mean_square + config.norm_epsilon) * weights.norms[path]
        return normed

    def rotate(x: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)

    x = weights.embedding()[ids].astype(np.float64)
    for n in range(config.layers):
        qkv = apply(f"layers.{n}.qkv", norm(x, f"layers.{n}.attention_norm"))
        by_head = qkv.reshape(len(ids), -1, config.head_dim)
        q, k, v = np.split(by_head, [config.heads, config.heads + config.kv_heads], axis=1)
        k, v = (np.repeat(each, config.heads // config.kv_heads, axis=1) for each in (rotate(k), v))
        scores = np.einsum("ihd,jhd->hij", rotate(q), k)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        x = x + apply(f"layers.{n}.output", np.einsum("hij,jhd->ihd", shares, v).reshape(len(ids), -1))
        gates, ups = np.split(apply(f"layers.{n}.gate_up", norm(x, f"layers.{n}.mlp_norm")), 2, axis=-1)
        x = x + apply(f"layers.{n}.down", gates / (1 + np.exp(-gates)) * ups)
    inputs["head"] = norm(x, "final_norm")
    return inputs


def slow_best_range(rows: Array) -> float:
    """The candidate with the least error, element by element."""
    losses = {}
    for bound in np.arange(3.0, 6.25, 0.25):
        step = bound / 127
        rounded = np.minimum(np.maximum(np.round(rows / step), -128), 127) * step
        losses[float(bound)] = float(((rows - rounded) ** 2).sum())
    return min(losses, key=lambda bound: losses[bound])


@pytest.mark.parametrize("tied", [False, True])
def test_statistics_are_those_of_a_slow_model(tied: bool, tmp_path: Path) -> None:
    weights = read_weights(tiny_checkpoint(biases=True, tie_word_embeddings=tied))
    calls: list[tuple[str, int, int, str]] = []
    statistics = calibrate(
        tapped_graph(weights, tmp_path),
        weights.config,
        GraphIO(),
        WINDOWS,
        threads=1,
        progress=lambda *call: calls.append(call),
    )
    by_window = [slow_inputs(weights, window) for window in WINDOWS]
    assert statistics.largest.keys() == weights.linears.keys()
    for path, largest in statistics.largest.items():
        rows = np.concatenate([inputs[path] for inputs in by_window])
        np.testing.assert_allclose(largest, np.abs(rows).max(axis=0), rtol=1e-3, atol=1e-4)
        if path.endswith(("qkv", "gate_up", "head")):
            assert statistics.best_range(path) == pytest.approx(slow_best_range(rows))
    assert calls[0] == ("Calibrating", 0, 68, "tokens")
    assert calls[-1] == ("Calibrating", 68, 68, "tokens")
    assert [done for _, done, _, _ in calls] == [0, 30, 60, 67, 68]


@pytest.mark.parametrize("size", [1.0, 1.5, 3.0, 100.0])
def test_the_best_range_weighs_rounding_against_clipping(size: float) -> None:
    random = np.random.default_rng(0)
    rows = (random.standard_normal((200, 64)) * size).astype(np.float32)
    statistics = ActivationStatistics()
    for part in np.split(rows, 4):
        statistics.add("x", part)
    assert statistics.best_range("x") == pytest.approx(slow_best_range(rows.astype(np.float64)))


def test_the_best_range_follows_the_rows() -> None:
    statistics = ActivationStatistics()
    statistics.add("flat", np.full((10, 4), 2.9, np.float32))
    statistics.add("wide", np.linspace(-6, 6, 400, dtype=np.float32).reshape(-1, 4))
    assert statistics.best_range("flat") < statistics.best_range("wide") == 6.0


def test_the_largest_of_each_channel_over_all_rows() -> None:
    statistics = ActivationStatistics()
    statistics.add("x", np.array([[1, -5, 0], [2, 1, 0]], np.float32))
    statistics.add("x", np.array([[-3, 1, 0]], np.float32))
    assert statistics.largest["x"].tolist() == [3, 5, 0]
