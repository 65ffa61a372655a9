"""What this machine's processor multiplies fastest."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Literal, get_args

WeightBytes = Literal["signed", "unsigned"]
WEIGHT_BYTES: tuple[WeightBytes, ...] = get_args(WeightBytes)

_X86 = ("x86_64", "amd64")
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def weight_bytes(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> WeightBytes:
    """How this machine likes the bytes of weights.

    x86-64 without VNNI has no exact product of unsigned activations and signed weights: ONNX Runtime then
    turns the weights into unsigned ones while it loads them, which takes a second for 130 MB. With VNNI, and
    on ARM, signed weights are the faster ones. Either kind is exact on every processor. Where the system
    does not tell, the answer is signed.
    """
    if sys.platform != "linux" or (machine or platform.machine()).lower() not in _X86:
        return "signed"
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return "signed" if _VNNI & set(line.split()) else "unsigned"
    return "signed"
