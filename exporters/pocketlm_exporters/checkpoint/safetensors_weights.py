"""The *.safetensors files of a folder, memory-mapped and read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the type "bfloat16", which safetensors asks it for)
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pocketlm.errors import CheckpointError, UnsupportedModelError

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_FLOATS = ("F32", "F16", "BF16", "F64")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_INDEX_BYTES = 64 << 20


class SafetensorsWeights:
    """`shapes` and `types` by tensor name, `files` that hold them, and `read`.

    Raises CheckpointError for missing or damaged files, UnsupportedModelError for weights in another
    format or of a type that is no floating-point number.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = _read_index(folder)
        self.files = sorted(set(index.values())) if index is not None else [_single_file(folder)]
        shards = {name: _open(folder / name) for name in self.files}
        if index is None:
            index = {tensor: name for name, shard in shards.items() for tensor in shard.keys()}  # noqa: SIM118
        self._shards: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        held = {name: set(shard.keys()) for name, shard in shards.items()}
        for tensor, name in index.items():
            if tensor not in held[name]:
                raise CheckpointError(
                    f"{folder / INDEX_NAME} says that {name} holds the tensor {tensor}, but it does not. "
                    "The files are not of the same model, or one is incomplete: fetch the model again."
                )
            view = shards[name].get_slice(tensor)
            self._shards[tensor] = shards[name]
            self.shapes[tensor], self.types[tensor] = tuple(view.get_shape()), view.get_dtype()
            if tensor.endswith(".weight"):
                self._check_type(tensor)

    def read(self, name: str) -> NDArray[np.float32]:
        self._check_type(name)
        tensor = self._shards[name].get_tensor(name)
        with np.errstate(over="ignore"):  # beyond float32: LazyTensors reports the infinity
            return np.asarray(tensor, dtype=np.float32)

    def _check_type(self, name: str) -> None:
        if self.types[name] not in _FLOATS:
            raise UnsupportedModelError(
                f"{self._folder}: the tensor {name} is stored as {self.types[name]}, expected "
                f"{', '.join(_FLOATS)}. Take the model in full precision; pocketlm quantizes it."
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}, which {INDEX_NAME} names. Fetch the model again."
        ) from None
    except Exception as error:  # the library's class for damage is a plain Exception's child, others may join
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch the model again.") from None


def _single_file(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if _SINGLE_NAME in names:
        return _SINGLE_NAME
    if len(names) == 1:
        return names[0]
    if names:
        raise CheckpointError(
            f"{folder} has {len(names)} safetensors files ({', '.join(names[:3])}, …) and no {INDEX_NAME} "
            "to say which tensor is where. Fetch the model again."
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UnsupportedModelError(
            f"{folder} holds its weights as a Python pickle ({pickles[0]}), which can run any code when it "
            "is read. pocketlm reads safetensors only: take a revision that has them, or convert it where "
            f'that does no harm: AutoModelForCausalLM.from_pretrained("{folder.name}")'
            f'.save_pretrained("{folder.name}-safe")'
        )
    raise CheckpointError(
        f"{folder} has no *.safetensors files, which hold the weights. Fetch the model again."
    )


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor → file name, or None if the folder has no index."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {_MAX_INDEX_BYTES >> 20} MiB")
        data = json.loads(path.read_text(encoding="utf-8"))
        names = data["weight_map"]
        if not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError("its weight_map names no files")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not an index with a weight_map from tensors to files: {error}. Fetch the model again."
        ) from None
    for name in set(names.values()):
        # A name with a separator would let a downloaded index point outside its folder.
        if set(name) & set("/\\:\0") or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names the file {name!r:.99}; a plain name of a safetensors file is expected."
            )
    return dict(names)
