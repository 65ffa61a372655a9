"""What every checkpoint reader returns, whatever the file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.manifest import Source, Tokens

Tensors = Mapping[str, NDArray[np.float32]]
"""Tensors under their Hugging Face names, each read (and dequantized) when it is asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, as its source states it.

    `config` has the keys of a Hugging Face `config.json` (`model_type`, `hidden_size`, …) whatever the
    source's format. `tensors` are float32, linears as (outputs, inputs), rotary pairs in Hugging Face's
    half-rotation order.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Tensors
    tokenizer_json: str
    chat_template: str | None
    tokens: Tokens
    source: Source
    licence: str | None
