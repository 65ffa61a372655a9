"""What quantization cost: two graphs of the same weights, teacher-forced on the same text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pocketlm.manifest import Quality
from pocketlm.progress import Progress
from pocketlm.session import Session

WINDOW = 512  # tokens that see each other
_CHUNK = 128
_MAX_LOGITS = 1 << 23  # of a chunk: 32 MiB an array, of which there are a handful


def compare(
    reference: Session, candidate: Session, windows: Sequence[Sequence[int]], *, text: str, progress: Progress
) -> Quality:
    """The candidate's quality against the reference on `windows` of a text, called `text` in the result.

    Each window starts from an empty context. The Kullback-Leibler divergence is of the
    reference's next-token distribution from the candidate's, in nats; perplexities are over the tokens that
    have a predecessor in their window.
    """
    divergences: list[NDArray[np.float32]] = []
    agreements: list[NDArray[np.bool_]] = []
    losses: list[NDArray[np.float32]] = []  # (2, tokens): reference, candidate
    size = min(_CHUNK, max(1, _MAX_LOGITS // reference.dimensions.vocabulary))
    done, total = 0, sum(map(len, windows))
    for window in windows:
        caches = reference.new_cache(len(window)), candidate.new_cache(len(window))
        for begin in range(0, len(window), size):
            progress("Verifying", done, total, "tokens")
            chunk = window[begin : begin + size]
            done += len(chunk)
            rows = range(len(chunk))
            p, q = (
                log_softmax(session.forward(chunk, cache, rows))
                for session, cache in zip((reference, candidate), caches, strict=True)
            )
            divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
            agreements.append(p.argmax(axis=-1) == q.argmax(axis=-1))
            following = np.asarray(window[begin + 1 : begin + size + 1], np.int64)
            rows_with_successor = np.arange(len(following))
            losses.append(-np.stack([p[rows_with_successor, following], q[rows_with_successor, following]]))
    progress("Verifying", total, total, "tokens")
    divergence = np.concatenate(divergences)
    perplexity_fp32, perplexity = np.exp(np.concatenate(losses, axis=1).mean(axis=1, dtype=np.float64))
    return Quality(
        text=text,
        tokens=total,
        perplexity=float(perplexity),
        perplexity_fp32=float(perplexity_fp32),
        # Rounding in the sums can bring a divergence of nothing a little below zero.
        kl_mean=max(0.0, float(divergence.mean(dtype=np.float64))),
        kl_p99=max(0.0, float(np.quantile(divergence, 0.99))),
        top1_agreement=float(np.concatenate(agreements).mean()),
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis, in place."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits
