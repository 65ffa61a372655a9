"""A checkpoint's tensors, checked against what the config says of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocketlm.errors import CheckpointError
from pocketlm_exporters.checkpoint.types import Checkpoint, Tensors
from pocketlm_exporters.decoder import Array, DecoderConfig, Linear


class CheckedTensors:
    """Tensors whose shapes are checked as they are read."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def read(self, name: str, shape: tuple[int, ...]) -> Array:
        try:
            tensor = self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"The checkpoint has no tensor {name}, which its config calls for."
            ) from None
        if tensor.shape != shape:
            raise CheckpointError(
                f"The tensor {name} has shape {tensor.shape}, the config calls for {shape}."
            )
        return tensor

    def packed(self, modules: Mapping[str, int], inputs: int) -> Linear:
        """One linear of several modules' outputs, in their order."""
        for module in modules:
            if f"{module}.weight" not in self._tensors:
                raise CheckpointError(
                    f"The checkpoint has no tensor {module}.weight, which its config calls for."
                )

        def weight() -> Array:
            parts = [self.read(f"{module}.weight", (outputs, inputs)) for module, outputs in modules.items()]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        bias: Array | None = None
        if any(f"{module}.bias" in self._tensors for module in modules):
            bias = np.concatenate(
                [
                    self.read(f"{module}.bias", (outputs,))
                    if f"{module}.bias" in self._tensors
                    else np.zeros(outputs, np.float32)
                    for module, outputs in modules.items()
                ]
            )
        return Linear(sum(modules.values()), inputs, weight, bias)


def layer_linears(tensors: CheckedTensors, config: DecoderConfig, layer: int) -> dict[str, Linear]:
    """The linears of one layer by their path, those that share an input packed into one."""
    attend, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    qkv = {f"{attend}.q_proj": queries, f"{attend}.k_proj": keys, f"{attend}.v_proj": keys}
    gate_up = {f"{mlp}.gate_proj": config.intermediate, f"{mlp}.up_proj": config.intermediate}
    return {
        f"layers.{layer}.qkv": tensors.packed(qkv, config.hidden),
        f"layers.{layer}.output": tensors.packed({f"{attend}.o_proj": config.hidden}, queries),
        f"layers.{layer}.gate_up": tensors.packed(gate_up, config.hidden),
        f"layers.{layer}.down": tensors.packed({f"{mlp}.down_proj": config.hidden}, config.intermediate),
    }


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the embedding serves as the head; where the config does not say, the tensors do."""
    return bool(checkpoint.config.get("tie_word_embeddings", "lm_head.weight" not in checkpoint.tensors))
