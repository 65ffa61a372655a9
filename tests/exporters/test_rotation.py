"""Rotating the residual stream changes no output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny import float_session, random_ids, read_weights, run, tiny_checkpoint
from pocketlm_exporters.quantize.rotation import random_rotation, rotate


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": True},
        {"biases": True, "num_key_value_heads": 1},
        {"biases": True, "num_key_value_heads": 4, "hidden_size": 40},
    ],
    ids=["grouped heads", "tied", "biases, one key head", "biases, multi-head, odd width"],
)
def test_computes_the_same(variant: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(**variant)
    weights = read_weights(checkpoint)
    rotated = rotate(weights)
    ids = random_ids(40)
    expected = run(float_session(checkpoint, weights, tmp_path / "as it is"), ids)
    found = run(float_session(checkpoint, rotated, tmp_path / "rotated"), ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rotates_what_writes_to_the_stream_and_folds_norms_into_what_reads_it() -> None:
    weights = read_weights(tiny_checkpoint(biases=True))
    rotated = rotate(weights)
    rotation = random_rotation(64)
    assert all((norm == 1).all() for norm in rotated.norms.values())
    assert rotated.norms.keys() == weights.norms.keys()
    np.testing.assert_allclose(rotated.embedding(), weights.embedding() @ rotation, atol=1e-5)
    down, before = rotated.linears["layers.0.down"], weights.linears["layers.0.down"]
    np.testing.assert_allclose(down.weight(), rotation.T @ before.weight(), atol=1e-5)
    assert down.bias is not None
    assert before.bias is not None
    np.testing.assert_allclose(down.bias, rotation.T @ before.bias, atol=1e-5)
    head = weights.linears["head"].weight() * weights.norms["final_norm"]
    np.testing.assert_allclose(rotated.linears["head"].weight(), head @ rotation, atol=1e-5)


def test_a_tied_head_becomes_a_weight_of_its_own() -> None:
    weights = read_weights(tiny_checkpoint(tie_word_embeddings=True))
    assert "head" not in weights.linears
    head = rotate(weights).linears["head"]
    assert (head.outputs, head.inputs) == weights.embedding().shape
    assert not np.allclose(head.weight(), rotate(weights).embedding())


def test_one_huge_channel_is_spread_over_all() -> None:
    checkpoint = tiny_checkpoint()
    table = checkpoint.tensors["model.embed_tokens.weight"].copy()
    table[:, 7] = 100.0
    rotated = rotate(read_weights(tiny_checkpoint(change={"model.embed_tokens.weight": table}))).embedding()
    spread = np.abs(rotated).max(axis=0)
    assert spread.max() < 100 / 2
    assert np.median(spread) > 100 / 64


@pytest.mark.parametrize("size", [1, 2, 64])
def test_the_rotation_is_orthogonal_and_always_the_same(size: int) -> None:
    rotation = random_rotation(size)
    assert rotation.dtype == np.float32
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(size), atol=1e-6)
    assert (rotation == random_rotation(size)).all()
