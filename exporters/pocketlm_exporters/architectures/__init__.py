"""One module a family, each with the same two exports: `read` and `decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pocketlm.errors import UnsupportedModelError
from pocketlm.manifest import GraphIO
from pocketlm_exporters.architectures import gemma3, llama
from pocketlm_exporters.checkpoint.types import Checkpoint
from pocketlm_exporters.decoder import DecoderWeights
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.embedding import EmbeddingEmitter
from pocketlm_exporters.graph.linear import LinearEmitter


class Architecture(Protocol):
    def read(self, checkpoint: Checkpoint) -> DecoderWeights: ...

    def decoder(
        self,
        weights: DecoderWeights,
        embedding: EmbeddingEmitter,
        linears: Mapping[str, LinearEmitter],
        io: GraphIO,
    ) -> GraphBuilder: ...


FAMILIES: Mapping[str, Architecture] = {"gemma3_text": gemma3, "llama": llama, "mistral": llama}
"""By `model_type` of the Hugging Face config."""


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Raises UnsupportedModelError for a family that has no module here."""
    family = str(checkpoint.config.get("model_type"))
    if family not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"{checkpoint.name} is of the family {family!r}; supported are {supported}."
        )
    return FAMILIES[family]
