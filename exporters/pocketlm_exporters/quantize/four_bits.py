"""The int4 recipe: four bits with GPTQ, eight where four do too much damage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from pocketlm.manifest import LayerPrecision
from pocketlm_exporters.decoder import Array, DecoderWeights, Linear
from pocketlm_exporters.graph.linear import BlockLinear, LinearEmitter, NibbleLinear
from pocketlm_exporters.quantize.gptq import gptq, loss
from pocketlm_exporters.quantize.nibbles import NibbleWeight, fit_grid, pack
from pocketlm_exporters.quantize.recipe import QuantizedDecoder, round_embedding
from pocketlm_exporters.quantize.rounding import BLOCK, round_blocks

_ALWAYS_FINE = "head"  # its errors go straight to the logits


@dataclass(frozen=True)
class FourBits:
    """A linear in four bits."""

    weight: NibbleWeight
    damage: float  # the output's squared error as a share of the output's square, in calibration


def round_linears(
    weights: DecoderWeights, gram: Callable[[str], Array], on_linear: Callable[[int, int], None]
) -> dict[str, FourBits]:
    """All linears but the head in four bits, by path.

    `gram` gives the Gram matrix (inputs, inputs) of a linear's inputs by its path. `on_linear(done, total)`
    is called after each.
    """
    paths = [path for path in weights.linears if path != _ALWAYS_FINE]
    rounded: dict[str, FourBits] = {}
    for path in paths:
        rounded[path] = round_linear(weights.linears[path].weight(), gram(path))
        on_linear(len(rounded), len(paths))
    return rounded


def round_linear(weight: Array, gram: Array) -> FourBits:
    """`weight` (outputs, inputs) in four bits, for inputs with the Gram matrix `gram` (inputs, inputs)."""
    grid = fit_grid(weight, np.diagonal(gram))
    codes = gptq(weight, gram, grid)
    total = float(loss(weight, gram).sum(dtype=np.float64))
    lost = float(loss(weight - grid.values(codes), gram).sum(dtype=np.float64))
    return FourBits(pack(weight, codes, grid), lost / total if total > 0 else 0.0)


def by_damage(rounded: Mapping[str, FourBits]) -> list[str]:
    """Paths of linears, first those that eight bits help most."""
    return sorted(rounded, key=lambda path: -rounded[path].damage)


def quantize(
    weights: DecoderWeights, rounded: Mapping[str, FourBits], finer: Collection[str]
) -> QuantizedDecoder:
    """The decoder in four bits, with embedding, head and the paths in `finer` at eight."""
    embedding, linears, report = round_embedding(weights)
    for path, linear in weights.linears.items():
        if path in finer or path not in rounded:
            linears[path], worst_error = _eight_bits(linear)
            report.append(LayerPrecision(path, f"int8-block{BLOCK}", worst_error))
        else:
            weight = rounded[path].weight
            linears[path] = NibbleLinear(weight, linear.inputs, linear.bias)
            report.append(LayerPrecision(path, f"int4-block{BLOCK}", weight.worst_error))
    return QuantizedDecoder(embedding, linears, tuple(report))


def describe(finer: int) -> str:
    """The recipe in a sentence, with how many linears were stored in eight bits."""
    recipe = f"GPTQ, four bits in blocks of {BLOCK} with zero points; embedding and head in eight"
    return f"{recipe}; so are the {finer} most sensitive linears" if finer else recipe


def _eight_bits(linear: Linear) -> tuple[LinearEmitter, float]:
    blocks = round_blocks(linear.weight())
    return BlockLinear(blocks, linear.inputs, linear.bias), blocks.worst_error
