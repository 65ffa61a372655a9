"""The measured quality against a slow reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from helpers.tiny import VOCABULARY, Array, float_session, random_ids, read_weights, run, tiny_checkpoint
from pocketlm.session import Session
from pocketlm_exporters import verify
from pocketlm_exporters.verify import compare, log_softmax

# One window spans chunks, one ends with a chunk, one has a single token behind it, one is a lone token.
WINDOWS = [random_ids(count, seed=count) for count in (200, 128, 129, 1)]
Call = tuple[str, int, int, str]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Session]:
    """Two models, the second one's weights a little off."""
    folder = tmp_path_factory.mktemp("verify")
    checkpoint = tiny_checkpoint()
    random = np.random.default_rng(0)
    noisy = {
        name: tensor + random.standard_normal(tensor.shape).astype(np.float32) * 0.005
        for name, tensor in checkpoint.tensors.items()
    }
    first = float_session(checkpoint, read_weights(checkpoint), folder / "first")
    return first, float_session(checkpoint, read_weights(tiny_checkpoint(change=noisy)), folder / "second")


def slow_log_softmax(logits: Array) -> np.ndarray:
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def test_against_a_slow_reference(sessions: tuple[Session, Session]) -> None:
    divergences: list[float] = []
    agreements: list[bool] = []
    losses: list[tuple[float, float]] = []
    for window in WINDOWS:
        p, q = (slow_log_softmax(run(session, window)) for session in sessions)
        for position in range(len(window)):
            divergences.append(float((np.exp(p[position]) * (p[position] - q[position])).sum()))
            agreements.append(bool(p[position].argmax() == q[position].argmax()))
            if position + 1 < len(window):
                following = window[position + 1]
                losses.append((-p[position, following], -q[position, following]))
    calls: list[Call] = []
    quality = compare(*sessions, WINDOWS, text="a text", progress=lambda *call: calls.append(call))
    assert (quality.text, quality.tokens) == ("a text", 458)
    assert quality.kl_mean == pytest.approx(np.mean(divergences), rel=1e-3)
    assert quality.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), rel=1e-3)
    assert 0.5 < np.mean(agreements) < 1
    assert quality.top1_agreement == pytest.approx(np.mean(agreements), abs=1.5 / 458)
    perplexities = np.exp(np.mean(losses, axis=0))
    assert (quality.perplexity_fp32, quality.perplexity) == pytest.approx(perplexities, rel=1e-4)
    assert quality.perplexity != quality.perplexity_fp32
    assert calls[0] == ("Verifying", 0, 458, "tokens")
    assert calls[-1] == ("Verifying", 458, 458, "tokens")


def test_a_large_vocabulary_is_compared_in_smaller_chunks(
    sessions: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(*sessions, WINDOWS, text="a text", progress=lambda *_: None)
    calls: list[Call] = []
    monkeypatch.setattr(verify, "_MAX_LOGITS", 50 * VOCABULARY)
    chunked = compare(*sessions, WINDOWS, text="a text", progress=lambda *call: calls.append(call))
    assert [done for _, done, _, _ in calls] == [0, 50, 100, 150, 200, 250, 300, 328, 378, 428, 457, 458]
    assert dataclasses.astuple(chunked)[2:] == pytest.approx(dataclasses.astuple(whole)[2:], rel=1e-3)
    monkeypatch.setattr(verify, "_MAX_LOGITS", 1)
    assert compare(*sessions, [[1, 2]], text="a text", progress=lambda *_: None).tokens == 2  # row by row


def test_a_model_is_no_worse_than_itself(sessions: tuple[Session, Session]) -> None:
    quality = compare(sessions[0], sessions[0], WINDOWS, text="a text", progress=lambda *_: None)
    assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0.0, 0.0, 1.0)
    assert quality.perplexity == quality.perplexity_fp32


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_log_softmax(scale: float) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * np.float32(scale)
    expected = slow_log_softmax(logits)
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-4, atol=1e-5)
