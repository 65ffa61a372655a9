"""Checked values of a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocketlm.errors import CheckpointError, UnsupportedModelError


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; `default` where the config has none. Raises CheckpointError."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"The config's {key} is {value!r}; a positive whole number is expected.")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; `default` where the config has none. Raises CheckpointError."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"The config's {key} is {value!r}; a positive number is expected.")
    return float(value)


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises CheckpointError for groups of unequal size, UnsupportedModelError for an unsupported width."""
    if heads % kv_heads:
        raise CheckpointError(
            f"The config has {heads} heads in {kv_heads} groups; the first must be a multiple."
        )
    if head_dim % 16:  # as ONNX Runtime's attention node asks
        raise UnsupportedModelError(f"The config's head_dim is {head_dim}; a multiple of 16 is expected.")
