"""What weight files tell about their precision, read without the packages that made them."""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

# `general.file_type`: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>
_GGUF_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}
# The key, the type "uint32" and the value. Metadata stand before the weights and seldom exceed 20 MB.
_GGUF_FILE_TYPE = re.compile(rb"general\.file_type\x04\x00\x00\x00(.{4})", re.DOTALL)
_GGUF_METADATA_BYTES = 64 << 20

# An AttributeProto's name and integer (fields 1 and 3) as protobuf writes them: onnx.proto.
_ONNX_BITS = re.compile(rb"\x0a\x04bits\x18(.)", re.DOTALL)

_OPENVINO_CONSTANT = re.compile(r'<data element_type="(\w+)"[^>]* size="(\d+)"')


def bytes_of(paths: Iterable[Path]) -> int:
    """The size of files."""
    return sum(path.stat().st_size for path in paths)


def gguf_type(path: Path) -> str:
    """The type that a GGUF file names for most of its tensors, "Q8_0" or "unknown"."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _GGUF_FILE_TYPE.search(data, 0, _GGUF_METADATA_BYTES)
        return _GGUF_TYPES.get(struct.unpack("<I", found[1])[0], "unknown") if found else "unknown"


def onnx_bits(path: Path) -> str:
    """The weights' bits in a graph with block-quantized products: "int4", "int4, int8", or "unknown".

    The graph's weights have to lie in a file of their own: this one is read as a whole.
    """
    bits = {found[1][0] for found in _ONNX_BITS.finditer(path.read_bytes())}
    return ", ".join(f"int{n}" for n in sorted(bits)) or "unknown"


def openvino_type(path: Path) -> str:
    """The element type that most bytes of an OpenVINO model's constants have: "u4", "i8", "f16", "unknown".

    `path` is the model's XML.
    """
    sizes: Counter[str] = Counter()
    for element_type, size in _OPENVINO_CONSTANT.findall(path.read_text(encoding="utf-8")):
        sizes[element_type] += int(size)
    return max(sizes, key=sizes.__getitem__, default="unknown")
