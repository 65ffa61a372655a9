"""Which precision each linear gets, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocketlm.manifest import LayerPrecision
from pocketlm_exporters.decoder import Array, DecoderWeights, Linear
from pocketlm_exporters.graph.embedding import (
    BlockEmbedding,
    EmbeddingEmitter,
    TiedBlockEmbedding,
    TiedBlockHead,
)
from pocketlm_exporters.graph.linear import BlockLinear, LinearEmitter, RowInt8Linear, StaticInt8Linear
from pocketlm_exporters.processor import WeightBytes
from pocketlm_exporters.quantize.rounding import BLOCK, round_blocks, round_channels

LinearPrecision = Literal["int8-static", "int8-row", "int8-block32"]
Predicate = Callable[[str], LinearPrecision]

_BEHIND_A_NORM = ("qkv", "gate_up", "head")
# The kinds of linear by what finer blocks for all of that kind gain, as measured on SmolLM2-135M.
_BY_GAIN = ("down", "qkv", "gate_up", "output", "head")
EMBEDDING = "embedding"


def can_have_fixed_range(path: str) -> bool:
    """Whether one range can do for the linear's input in a rotated model: it comes from a norm."""
    return path.rpartition(".")[2] in _BEHIND_A_NORM


def int8(fixed: Collection[str], finer: Collection[str] = ()) -> Predicate:
    """The int8 recipe: path → precision.

    The linears at `fixed` have one range for all rows, which saves the search for each row's own: rows behind
    a norm of a rotated model are alike. Other rows differ by orders of magnitude and get a scale each.
    `finer` are the paths that a quality gate spends more on.
    """

    def precision(path: str) -> LinearPrecision:
        if path in finer:
            return "int8-block32"
        return "int8-static" if path in fixed else "int8-row"

    return precision


def describe(rotated: bool, finer: int, weights: WeightBytes) -> str:
    """The recipe in a sentence, with how many linears were stored in finer blocks."""
    if rotated:
        recipe = (
            f"rotated residual stream; smoothed; {weights} weights per channel; "
            "activations fixed behind norms, else per row"
        )
    else:
        recipe = f"smoothed, behind norms too; {weights} weights per channel; activations per row"
    return f"{recipe}; {finer} most sensitive linears in blocks of {BLOCK}" if finer else recipe


def by_sensitivity(weights: DecoderWeights, largest: Mapping[str, Array]) -> list[str]:
    """Paths of linears, first those where finer blocks are best spent.

    Within a kind they are ordered by the noise that rounding adds to the output for the row with the largest
    activation: the activation's step squared times the weights' sum of squares.
    """

    def rank(path: str) -> tuple[int, float]:
        noise = float(largest[path].max()) ** 2 * float(np.square(weights.linears[path].weight()).sum())
        return _BY_GAIN.index(path.rpartition(".")[2]), -noise

    return sorted(weights.linears, key=rank)


@dataclass(frozen=True)
class QuantizedDecoder:
    """Emitters by path, and what each stored weight lost by rounding."""

    embedding: EmbeddingEmitter
    linears: dict[str, LinearEmitter]
    report: tuple[LayerPrecision, ...]


def quantize(
    weights: DecoderWeights,
    precision: Predicate,
    ranges: Mapping[str, float],
    weight_bytes: WeightBytes,
    on_linear: Callable[[int, int], None],
) -> QuantizedDecoder:
    """Rounds every weight. `ranges` are the activation ranges of linears with a fixed one, by path.

    `on_linear(done, total)` is called after each weight.
    """
    total = len(weights.linears) + 1
    embedding, linears, report = round_embedding(weights)
    on_linear(1, total)
    for path, linear in weights.linears.items():
        linears[path], worst_error = _round(linear, precision(path), ranges.get(path), weight_bytes)
        report.append(LayerPrecision(path, precision(path), worst_error))
        on_linear(len(report), total)
    return QuantizedDecoder(embedding, linears, tuple(report))


def round_embedding(
    weights: DecoderWeights,
) -> tuple[EmbeddingEmitter, dict[str, LinearEmitter], list[LayerPrecision]]:
    """The embedding in eight-bit blocks, the head where it shares its table, and the report so far."""
    table = round_blocks(weights.embedding())
    report = [LayerPrecision(EMBEDDING, "int8-block32", table.worst_error)]
    if "head" in weights.linears:
        return BlockEmbedding(table, weights.config.hidden), {}, report
    tied = TiedBlockEmbedding(table, weights.config.hidden)
    return tied, {"head": TiedBlockHead(tied)}, report


def _round(
    linear: Linear, precision: LinearPrecision, activation_range: float | None, weight_bytes: WeightBytes
) -> tuple[LinearEmitter, float]:
    weight: Array = linear.weight()
    if precision == "int8-block32":
        blocks = round_blocks(weight)
        return BlockLinear(blocks, linear.inputs, linear.bias), blocks.worst_error
    channels = round_channels(weight)
    if weight_bytes == "unsigned":
        channels = channels.unsigned()
    if precision == "int8-static":
        if activation_range is None:
            raise ValueError("a linear with a fixed activation range was not calibrated")
        return StaticInt8Linear(channels, linear.bias, activation_range), channels.worst_error
    return RowInt8Linear(channels, linear.bias), channels.worst_error
