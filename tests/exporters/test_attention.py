"""The attention node is written so that ONNX Runtime runs its fast way; whether it is right, parity shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from helpers.tiny import float_session, read_weights, tiny_checkpoint
from helpers.tiny_gemma3 import gemma3_checkpoint
from pocketlm_exporters.checkpoint import Checkpoint

SINK = 11


@pytest.mark.parametrize("checkpoint", [tiny_checkpoint(), gemma3_checkpoint()], ids=["llama", "gemma3"])
def test_queries_come_scaled_and_nothing_goes_down_the_sink(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights = read_weights(checkpoint)
    float_session(checkpoint, weights, tmp_path)
    graph = ir.load(tmp_path / "model.onnx").graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == weights.config.layers
    for node in nodes:
        assert node.attributes["scale"].as_float() == 1.0
        sink = node.inputs[SINK]
        assert sink is not None
        assert sink.const_value is not None
        values = sink.const_value.numpy()
        assert values.shape == (weights.config.heads,)
        with np.errstate(under="ignore", over="ignore"):
            assert (np.exp(values - np.float32(-1e30)) == 0).all()
