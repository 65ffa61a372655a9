"""Smoothing changes no output, and moves range from activations to weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny import Array, float_session, random_ids, read_weights, run, tiny_checkpoint
from helpers.tiny_gemma3 import gemma3_checkpoint
from pocketlm_exporters.checkpoint import Checkpoint
from pocketlm_exporters.decoder import DecoderWeights
from pocketlm_exporters.quantize.smoothing import smooth, smoothing_scales

VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped heads": {},
    "one key head, biases": {"num_key_value_heads": 1, "biases": True},
    "grouped heads, biases, tied": {"biases": True, "tie_word_embeddings": True},
}


def largest_of(weights: DecoderWeights) -> dict[str, Array]:
    """Channels that differ by orders of magnitude."""
    random = np.random.default_rng(0)
    return {
        path: np.exp(random.uniform(-4, 4, linear.inputs)).astype(np.float32)
        for path, linear in weights.linears.items()
    }


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_computes_the_same(variant: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(**variant)
    weights = read_weights(checkpoint)
    scales = smoothing_scales(weights, largest_of(weights), 0.5)
    assert all(np.ptp(each) > 1 for each in scales.values())
    ids = random_ids(40)
    expected = run(float_session(checkpoint, weights, tmp_path / "as it is"), ids)
    found = run(float_session(checkpoint, smooth(weights, scales), tmp_path / "smooth"), ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_scales_are_those_of_the_paper(variant: dict[str, Any], alpha: float) -> None:
    weights = read_weights(tiny_checkpoint(**variant))
    config, largest = weights.config, largest_of(weights)
    scales = smoothing_scales(weights, largest, alpha)
    assert set(scales) == {f"layers.{n}.{kind}" for n in (0, 1) for kind in ("output", "down")}
    per_group = config.heads // config.kv_heads
    for path, found in scales.items():
        weight = weights.linears[path].weight()
        for channel in range(0, weight.shape[1], 5):
            together = [channel]
            if path.endswith("output"):  # one value channel feeds the same place in each head of a group
                head, place = divmod(channel, config.head_dim)
                first = head // per_group * per_group
                together = [(first + other) * config.head_dim + place for other in range(per_group)]
            activation = max(float(largest[path][each]) for each in together)
            column = max(float(np.abs(weight[:, each]).max()) for each in together)
            expected = activation**alpha / column ** (1 - alpha)
            np.testing.assert_allclose(found[together], expected, rtol=1e-5)


def test_weights_take_what_activations_lose() -> None:
    weights = read_weights(tiny_checkpoint(biases=True))
    scales = smoothing_scales(weights, largest_of(weights), 0.5)
    smoothed = smooth(weights, scales)
    for path, divisors in scales.items():
        before, after = weights.linears[path], smoothed.linears[path]
        np.testing.assert_allclose(after.weight(), before.weight() * divisors, rtol=1e-6)
        assert (after.bias == before.bias).all()
    before, after = weights.linears["layers.1.gate_up"], smoothed.linears["layers.1.gate_up"]
    inner = weights.config.intermediate
    assert (after.weight()[:inner] == before.weight()[:inner]).all()  # the gates stay
    np.testing.assert_allclose(
        after.weight()[inner:] * scales["layers.1.down"][:, None], before.weight()[inner:], rtol=1e-5
    )


def test_channels_that_never_fire_or_that_nobody_reads_stay() -> None:
    checkpoint = tiny_checkpoint()
    down = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].copy()
    down[:, 3] = 0
    weights = read_weights(tiny_checkpoint(change={"model.layers.0.mlp.down_proj.weight": down}))
    largest = largest_of(weights)
    largest["layers.0.down"][5] = 0
    scales = smoothing_scales(weights, largest, 0.5)["layers.0.down"]
    assert scales[3] == scales[5] == 1
    assert scales[4] != 1


def test_extreme_channels_are_bounded() -> None:
    weights = read_weights(tiny_checkpoint())
    largest = largest_of(weights)
    largest["layers.0.down"][:2] = 1e30, 1e-4
    scales = smoothing_scales(weights, largest, 1.0)["layers.0.down"]
    assert scales[0] == np.float32(1e4)
    assert scales[1] == np.float32(1e-4)


@pytest.mark.parametrize("make", [tiny_checkpoint, gemma3_checkpoint], ids=["llama", "gemma3"])
def test_behind_norms_too(make: Callable[[], Checkpoint], tmp_path: Path) -> None:
    checkpoint = make()
    weights = read_weights(checkpoint)
    largest = largest_of(weights)
    scales = smoothing_scales(weights, largest, 0.5, behind_norms=True)
    assert set(scales) == set(weights.linears) - {"head"}
    smoothed = smooth(weights, scales)
    path, norm = "layers.1.gate_up", "layers.1.mlp_norm"
    column = np.abs(weights.linears[path].weight()).max(axis=0)
    np.testing.assert_allclose(scales[path], np.sqrt(largest[path] / column), rtol=1e-5)
    np.testing.assert_allclose(smoothed.norms[norm], weights.norms[norm] / scales[path], rtol=1e-6)
    ids = random_ids(40)
    expected = run(float_session(checkpoint, weights, tmp_path / "as it is"), ids)
    found = run(float_session(checkpoint, smoothed, tmp_path / "smooth"), ids)
    np.testing.assert_allclose(found, expected, atol=1e-3)
