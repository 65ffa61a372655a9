"""How a prompt is cut into forward passes."""

from __future__ import annotations

from collections.abc import Iterator

PREFILL_CHUNK = 128
"""Tokens in one forward pass of a prompt. Attention's scratch memory grows with it, and with that memory
time; fewer rows leave the matrix products' speed unused."""


def passes(start: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Where the forward passes over the tokens `start` … `end` − 1 of a prompt begin and end.

    `chunk` is how many tokens go in one; from three on, none goes alone if it can be helped (see `KVCache`).
    """
    while start < end:
        count = chunk - 1 if end - start == chunk + 1 and chunk > 2 else chunk
        yield start, min(start + count, end)
        start += count
