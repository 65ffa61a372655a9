"""The GGUF container: metadata and tensors of one file, each tensor read when it is asked for.

The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Tensor types, block sizes and
dequantization are the `gguf` library's. Its reader is not used: it needs five seconds for the metadata
of a 49,152-token vocabulary, and it believes every count that a damaged file claims.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from pocketlm.errors import CheckpointError, UnsupportedModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# Vocabularies of 260,000 tokens need about 20 MB. The bound keeps a damaged count from filling memory.
_MAX_HEADER_BYTES = 64 << 20
_MAX_NESTING = 4

_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9

T = TypeVar("T")


class Metadata:
    """A GGUF file's key-value pairs. A value of an unexpected type is a CheckpointError."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self._where = where

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value, or None if there is none. `kind` is str, bool, int or float."""
        value = self.values.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None or type(value) is kind:
            return value
        raise CheckpointError(f"{self._where}: {key} is {_shortened(value)}, expected {kind.__name__}.")

    def require(self, key: str, kind: type[T]) -> T:
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(
                f"{self._where} says nothing about {key}. The file is incomplete: fetch or convert it again."
            )
        return value

    def texts(self, key: str) -> list[str] | None:
        """The array of strings under `key`, or None if there is none."""
        items = self.values.get(key)
        if items is None or (isinstance(items, list) and all(isinstance(item, str) for item in items)):
            return items
        raise CheckpointError(f"{self._where}: {key} is {_shortened(items)}, expected an array of strings.")

    def numbers(self, key: str) -> NDArray[Any] | None:
        """The array of numbers under `key`, or None if there is none."""
        items = self.values.get(key)
        if items is None or isinstance(items, np.ndarray):
            return items
        raise CheckpointError(f"{self._where}: {key} is {_shortened(items)}, expected an array of numbers.")


@dataclass(frozen=True)
class TensorEntry:
    shape: tuple[int, ...]  # rows first, as in numpy; the file has it the other way round
    type: GGMLQuantizationType
    start: int  # bytes from the beginning of the file
    bytes: int


class GgufFile:
    """An open GGUF file: `metadata`, `entries` (tensors by their GGUF names) and `read`.

    Opening reads the header only and checks that every tensor lies inside the file. Raises
    CheckpointError for a damaged file, UnsupportedModelError for a version or tensor type that pocketlm
    cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:  # which mmap refuses
                    raise CheckpointError(f"{path} is empty. Fetch it again.")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        header = _Header(self._data, path)
        tensor_count, pair_count = header.preamble()
        self.metadata = Metadata(header.pairs(pair_count), str(path))
        self.entries = self._entries(header, tensor_count)

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor, dequantized. `name` must be one of `entries`."""
        entry = self.entries[name]
        raw = np.frombuffer(self._data, np.uint8, entry.bytes, entry.start)
        with np.errstate(all="ignore"):  # damaged scales overflow; LazyTensors reports what comes of it
            values = dequantize(raw.reshape(*entry.shape[:-1], -1), entry.type)
        return np.require(values.reshape(entry.shape), np.float32, ["C", "A"])

    def _entries(self, header: _Header, count: int) -> dict[str, TensorEntry]:
        alignment = self.metadata.get("general.alignment", int)
        alignment = _DEFAULT_ALIGNMENT if alignment is None else alignment
        if alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment}, expected a power of two.")
        found = header.tensors(count)
        start = -(-header.position // alignment) * alignment
        size = len(self._data)
        entries = {}
        for name, (dimensions, code, offset) in found.items():
            entry = _entry(self.path, name, dimensions, code, start + offset)
            if entry.start + entry.bytes > size:
                raise CheckpointError(
                    f"{self.path}: the tensor {name} ends at byte {entry.start + entry.bytes:,}, but the "
                    f"file has {size:,} bytes. It is truncated or damaged: fetch it again."
                )
            entries[name] = entry
        for type_ in {entry.type for entry in entries.values()}:
            _check_type(self.path, type_)
        return entries


def _entry(path: Path, name: str, dimensions: tuple[int, ...], code: int, start: int) -> TensorEntry:
    shape = dimensions[::-1]
    try:
        type_ = GGMLQuantizationType(code)
        block, block_bytes = GGML_QUANT_SIZES[type_]
    except (ValueError, KeyError):
        raise UnsupportedModelError(
            f"{path}: the tensor {name} is of type {code}, which the installed gguf library does not know. "
            "Upgrade gguf, or take the model in another quantization."
        ) from None
    if not shape or not all(shape) or shape[-1] % block:
        raise CheckpointError(
            f"{path}: the tensor {name} has the shape {shape}, expected rows of whole {type_.name} blocks "
            f"of {block}. The file is damaged: fetch it again."
        )
    return TensorEntry(shape, type_, start, prod(shape) // block * block_bytes)


def _check_type(path: Path, type_: GGMLQuantizationType) -> None:
    """Dequantizes one block of zeros: the library lists nowhere what it can do."""
    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[type_][1], np.uint8), type_)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{path} holds {type_.name} tensors, which the gguf library cannot dequantize. "
            "Take the model in another quantization, for example Q8_0 or F16."
        ) from None


class _Header:
    """Reads forward through the header and never beyond its bounds."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._end = min(len(data), _MAX_HEADER_BYTES)
        self.position = 0

    def preamble(self) -> tuple[int, int]:
        """(tensors, key-value pairs) that the file claims to have."""
        magic = self._data[: len(MAGIC)]
        if magic != MAGIC:
            raise CheckpointError(
                f"{self._path} is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}."
            )
        self.position = len(MAGIC)
        version = self._u32()
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self._path} is a big-endian GGUF file, expected little-endian. Take the file for ordinary "
                "machines, or convert it with gguf-convert-endian."
            )
        if version not in _VERSIONS:
            remedy = "Convert the model again" if version < min(_VERSIONS) else "Upgrade pocketlm"
            raise UnsupportedModelError(
                f"{self._path} has GGUF version {version}, expected {' or '.join(map(str, _VERSIONS))}. "
                f"{remedy}."
            )
        return self._u64(), self._u64()

    def pairs(self, count: int) -> dict[str, Any]:
        def pair() -> tuple[str, Any]:
            return self._string(), self._value(self._u32())

        return self._distinct(count, pair, "key")

    def tensors(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """name → (dimensions, fastest first; type; offset from the beginning of the tensor data)."""

        def tensor() -> tuple[str, tuple[tuple[int, ...], int, int]]:
            name, dimensions = self._string(), self._u32()
            if dimensions > _MAX_DIMENSIONS:
                raise CheckpointError(
                    f"{self._path}: the tensor {name[:99]} has {dimensions} dimensions, expected at most "
                    f"{_MAX_DIMENSIONS}. The file is damaged: fetch it again."
                )
            shape = tuple(self._u64() for _ in range(dimensions))
            return name, (shape, self._u32(), self._u64())

        return self._distinct(count, tensor, "tensor")

    def _distinct(self, count: int, read: Callable[[], tuple[str, T]], what: str) -> dict[str, T]:
        items: dict[str, T] = {}
        for _ in range(count):  # ends early, at the header's bound, where the count is false
            name, item = read()
            if name in items:
                raise CheckpointError(f"{self._path} has the {what} {name[:99]} twice. Fetch it again.")
            items[name] = item
        return items

    def _value(self, code: int, nesting: int = 0) -> Any:
        if code == _STRING:
            return self._string()
        if code in _NUMBERS:
            return self._numbers(code, 1)[0].item()
        if code != _ARRAY or nesting > _MAX_NESTING:
            raise CheckpointError(f"{self._path} has a metadata value of unknown type {code}. It is damaged.")
        item, count = self._u32(), self._u64()
        if item in _NUMBERS:
            return self._numbers(item, count)
        return [self._value(item, nesting + 1) for _ in range(count)]

    def _numbers(self, code: int, count: int) -> NDArray[Any]:
        dtype = _NUMBERS[code]
        return np.frombuffer(self._data, dtype, count, self._take(count * dtype.itemsize))

    def _u32(self) -> int:
        return int.from_bytes(self._bytes(4), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._bytes(8), "little")

    def _bytes(self, count: int) -> bytes:
        start = self._take(count)
        return self._data[start : start + count]

    def _string(self) -> str:
        length = self._u64()
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self._path} has text before byte {self.position:,} that is not UTF-8. "
                "It is damaged: fetch it again."
            ) from None

    def _take(self, count: int) -> int:
        """Where the next `count` bytes begin; steps over them."""
        start = self.position
        if count > self._end - start:
            what = "truncated" if self._end == len(self._data) else "damaged"
            raise CheckpointError(
                f"{self._path} is {what}: its header wants {count:,} bytes at byte {start:,}, and "
                f"{self._end - start:,} are left of {self._end:,}. Fetch it again."
            )
        self.position = start + count
        return start


def _shortened(value: object) -> str:
    text = "an array" if isinstance(value, list | np.ndarray) else repr(value)
    return text if len(text) < 99 else text[:99] + "…"
