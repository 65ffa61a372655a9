"""What weight files tell about their precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers.checkpoints import CONFIG, llama_metadata, write_gguf
from pocketlm_benchmarks.engines.weight_files import bytes_of, gguf_type, onnx_bits, openvino_type


@pytest.mark.parametrize(("code", "name"), [(7, "Q8_0"), (15, "Q4_K_M"), (999, "unknown"), (None, "unknown")])
def test_gguf(tmp_path: Path, code: int | None, name: str) -> None:
    metadata = {**llama_metadata(CONFIG), "general.file_type": code}
    path = write_gguf(tmp_path / "a.gguf", metadata, {"x.weight": np.ones((2, 32), np.float32)})
    assert gguf_type(path) == name


def product(bits: int) -> onnx.NodeProto:
    inputs = ["x", "w", "scales"]
    return onnx.helper.make_node(
        "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=32, N=32, bits=bits, block_size=32
    )


@pytest.mark.parametrize(
    ("bits", "name"), [([4, 4], "int4"), ([8], "int8"), ([8, 4], "int4, int8"), ([], "unknown")]
)
def test_onnx(tmp_path: Path, bits: list[int], name: str) -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], ["r"]), *map(product, bits)]
    graph = onnx.helper.make_graph(nodes, "decoder", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    assert onnx_bits(tmp_path / "model.onnx") == name


def test_openvino(tmp_path: Path) -> None:
    path = tmp_path / "openvino_model.xml"
    path.write_text(
        '<net><data element_type="i64" shape="1" offset="0" size="8" />'
        '<data element_type="f16" shape="9, 1" offset="8" size="900" />'
        '<data element_type="u4" shape="9, 64" offset="908" size="500" />'
        '<data element_type="u4" shape="9, 64" offset="1408" size="500" />'
        '<data element_type="f32" shape="?,64" /></net>'
    )
    assert openvino_type(path) == "u4"
    path.write_text("<net/>")
    assert openvino_type(path) == "unknown"


def test_bytes(tmp_path: Path) -> None:
    for name, size in (("model.onnx", 3), ("model.onnx.data", 40), ("other", 500)):
        (tmp_path / name).write_bytes(bytes(size))
    assert bytes_of(tmp_path.glob("model.onnx*")) == 43
