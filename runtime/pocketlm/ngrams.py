"""The table of n-grams that a bundle may carry: what its model mostly says behind one to three tokens.

`ngrams.npy` is one array in numpy's format, sorted by context:

| field | type | |
| --- | --- | --- |
| context | uint64 | one to three token ids, the newest in the lowest 21 bits; each is stored plus one |
| token | uint32 | what follows most often |
| chance | float32 | how often it does, from 0 to 1 |

A wrong entry costs time and never changes an answer, as drafts are only verified.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, InvalidSettingError

NGRAMS_NAME = "ngrams.npy"
LONGEST_CONTEXT = 3  # tokens

_BITS = 21  # a token id in a context
_ENTRY = np.dtype([("context", "<u8"), ("token", "<u4"), ("chance", "<f4")])
_REMEDY = "Copy the bundle again, or export it again."


class NgramTable:
    """Contexts → the token to expect and its chance. Read-only, safe for several threads."""

    def __init__(self, entries: NDArray[np.void]) -> None:
        """`entries` as in the file, already checked."""
        # Single items of these come out several times faster than numpy's, and as plain numbers.
        self._contexts = entries["context"].astype(np.uint64).data
        self._tokens = entries["token"].astype(np.uint32).data
        self._chances = entries["chance"].astype(np.float32).data

    def __len__(self) -> int:
        return len(self._contexts)

    @classmethod
    def load(cls, path: Path, vocabulary: int) -> NgramTable:
        """Raises BundleError for a file that is no such table, or one with ids outside the vocabulary."""
        try:
            entries = np.lib.format.open_memmap(path, mode="r")  # reads plain arrays and nothing else
        except Exception as error:  # its exceptions for damaged headers have no common base
            raise BundleError(f"{path} is not a table of n-grams: {error}. {_REMEDY}") from error
        if entries.dtype != _ENTRY or entries.ndim != 1:
            raise BundleError(
                f"{path} holds {entries.ndim} dimensions of {entries.dtype}; a list of {_ENTRY} is expected. "
                f"{_REMEDY}"
            )
        if (problem := _problem(entries, vocabulary)) is not None:
            raise BundleError(f"{path} has {problem}. {_REMEDY}")
        return cls(entries)

    def expect(self, ids: Sequence[int]) -> tuple[int, float] | None:
        """What follows the longest context that ends `ids` and is in the table; None if none is."""
        contexts = self._contexts
        for length in range(min(LONGEST_CONTEXT, len(ids)), 0, -1):
            context = _context(ids[-length:])
            place = bisect_left(contexts, context)
            if place < len(contexts) and contexts[place] == context:
                return self._tokens[place], self._chances[place]
        return None


def write_table(path: Path, entries: Mapping[tuple[int, ...], tuple[int, float]]) -> None:
    """Writes what `NgramTable.load` reads: contexts of one to three ids → (token, chance).

    Raises InvalidSettingError for a context of another length, or an id that does not fit.
    """
    for context in entries:
        if not 1 <= len(context) <= LONGEST_CONTEXT or not all(
            0 <= each < (1 << _BITS) - 1 for each in context
        ):
            raise InvalidSettingError(
                f"The context {context} does not fit the table: 1 to {LONGEST_CONTEXT} ids below "
                f"{(1 << _BITS) - 1:,} are expected."
            )
    rows = sorted((_context(context), token, chance) for context, (token, chance) in entries.items())
    np.save(path, np.array(rows, _ENTRY), allow_pickle=False)


def _context(ids: Sequence[int]) -> int:
    packed = 0
    for token_id in ids:
        packed = packed << _BITS | token_id + 1
    return packed


def _problem(entries: NDArray[Any], vocabulary: int) -> str | None:
    contexts, chances = entries["context"], entries["chance"]
    newest = contexts & np.uint64((1 << _BITS) - 1)
    if np.any(contexts[1:] <= contexts[:-1]):
        return "contexts that do not ascend"
    if np.any(newest == 0) or np.any(contexts >> np.uint64(_BITS * LONGEST_CONTEXT)):
        return "contexts that hold no ids"
    if np.any(entries["token"] >= vocabulary):
        return f"token ids outside the vocabulary of {vocabulary:,}"
    if not np.all((chances >= 0) & (chances <= 1)):
        return "chances that are not between 0 and 1"
    return None
