"""How much memory a loaded model may take, and how much the machine has for models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from pocketlm.bundle import TOKENIZER_NAME
from pocketlm.device import control_group_bytes
from pocketlm.manifest import Manifest
from pocketlm.prefill import PREFILL_CHUNK
from pocketlm.speculate import LONGEST_DRAFT

BUDGET_SHARE = 0.8
"""Of the memory that is available when the server starts. The rest is for the server itself (about 100 MB),
for what other programs will want, and for loading, which shortly takes more than what is loaded."""

_TOKENIZER_FACTOR = 30
"""What a tokenizer takes in memory for each byte of its file: 28 with 262,144 tokens, 30 with 49,152."""

_RUNTIME_BYTES = 64 << 20  # the graph, threads, activations, and what an allocator keeps to itself


@dataclass(frozen=True)
class MemoryEstimate:
    """An upper bound of what one model takes, by what takes it.

    The system provides memory for keys and values page by page as they are written, so a model that has
    answered nothing yet takes little more than its weights.
    """

    weights_bytes: int
    tokenizer_bytes: int
    buffers_bytes: int  # logits, attention's scratch memory, the runtime's own
    slot_bytes: int  # the keys and values of one answer with a full context
    slots: int  # answers under way at once
    cache_bytes: int  # conversations that are not under way

    @property
    def least_bytes(self) -> int:
        """What is needed for one answer with a full context."""
        return self.weights_bytes + self.tokenizer_bytes + self.buffers_bytes + self.slot_bytes

    @property
    def most_bytes(self) -> int:
        """What it grows to with a full context in every slot and a full cache.

        Answers that wait for slow readers give their turn to others and are not counted.
        """
        return self.least_bytes + (self.slots - 1) * self.slot_bytes + self.cache_bytes


def estimate(
    manifest: Manifest, *, context_length: int, concurrency: int, cache_bytes: int
) -> MemoryEstimate:
    """What the model takes with these arguments to `pocketlm.load`.

    Layers with a sliding window count like the others: of an answer, which is computed token by token, they
    keep everything as well.
    """
    of = manifest.dimensions
    slots = 1 << max(0, concurrency - 1).bit_length()  # their number doubles as they are needed
    tokenizer = manifest.files.get(TOKENIZER_NAME)
    tokenizer_bytes = 0 if tokenizer is None else tokenizer.bytes
    # Any run of neighbouring slots may have stepped together, and each has logits of its own.
    rows = slots * (LONGEST_DRAFT + 1) + sum(count * (slots - count + 1) for count in range(2, slots + 1))
    scores = 2 * of.heads * PREFILL_CHUNK * context_length
    return MemoryEstimate(
        weights_bytes=manifest.bytes - tokenizer_bytes,
        tokenizer_bytes=_TOKENIZER_FACTOR * tokenizer_bytes,
        buffers_bytes=4 * (rows * of.vocabulary + scores) + _RUNTIME_BYTES,
        slot_bytes=4 * 2 * of.layers * of.kv_heads * of.head_dim * context_length,
        slots=slots,
        cache_bytes=cache_bytes,
    )


def default_budget_bytes(root: Path = Path("/")) -> int:
    """`BUDGET_SHARE` of what is available to this process now: a container may have less than its machine.
    `root` as in `control_group_bytes`."""
    available, left = psutil.virtual_memory().available, control_group_bytes(root)
    return int(BUDGET_SHARE * (available if left is None else min(available, left)))
