"""The rotary frequencies that a Hugging Face config asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.architectures.config_values import number


def inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Radians per token of each rotary pair (RoFormer, arXiv 2104.09864), stretched as the config asks."""
    # transformers 5 puts the base and the scaling into one object.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"The config's rope_scaling is {scaling!r}; an object or null is expected.")
    base = number(scaling, "rope_theta", number(config, "rope_theta", 10_000.0))
    frequencies = [base ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return tuple(frequencies)
    if kind == "linear":
        return tuple(frequency / number(scaling, "factor") for frequency in frequencies)
    if kind == "factors":  # each pair's own divisor, as GGUF stores them
        factors: Sequence[float] = scaling["factors"]
        if len(factors) != len(frequencies):
            raise CheckpointError(f"rope_scaling has {len(factors)} factors, expected {len(frequencies)}.")
        return tuple(
            frequency / float(factor) for frequency, factor in zip(frequencies, factors, strict=True)
        )
    if kind == "llama3":
        return tuple(_llama3_frequency(frequency, scaling) for frequency in frequencies)
    raise UnsupportedModelError(
        f"The config's rope scaling is {kind!r}; supported are default, linear and llama3."
    )


def _llama3_frequency(frequency: float, scaling: Mapping[str, Any]) -> float:
    """Llama 3.1's stretch: long wavelengths fully, short ones not, a ramp between."""
    factor = number(scaling, "factor")
    low, high = number(scaling, "low_freq_factor"), number(scaling, "high_freq_factor")
    if not low < high:
        raise CheckpointError(
            f"The config's high_freq_factor is {high}; more than low_freq_factor ({low}) is due."
        )
    turns = number(scaling, "original_max_position_embeddings") * frequency / (2 * math.pi)
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return share * frequency + (1 - share) * frequency / factor
