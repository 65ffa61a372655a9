"""Reads a trained model, whatever its file format: one `Checkpoint` with Hugging Face's names and order."""

from __future__ import annotations

from pathlib import Path

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm.hub import SourceFiles
from pocketlm.progress import Progress, silent
from pocketlm_exporters.checkpoint.gguf import open_gguf
from pocketlm_exporters.checkpoint.gguf_file import MAGIC
from pocketlm_exporters.checkpoint.safetensors_folder import open_safetensors_folder
from pocketlm_exporters.checkpoint.types import Checkpoint, Tensors

__all__ = ["Checkpoint", "Tensors", "open_checkpoint"]

_READABLE = "pocketlm reads GGUF files and folders with config.json, tokenizer.json and *.safetensors."
# How files of other formats begin.
_PICKLE, _ZIP = b"\x80", b"PK\x03\x04"


def open_checkpoint(source: SourceFiles, *, progress: Progress = silent) -> Checkpoint:
    """The model at `source.path`; its content decides on the reader, not its name.

    Weights are read when they are asked for. `progress` hears of the hashing, which reads the whole
    source once. Raises CheckpointError for a source that is damaged or incomplete,
    UnsupportedModelError for one that pocketlm has no code for.
    """
    try:
        return _open(source, progress)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or source.path} cannot be read: {error.strerror or error}. "
            "Check that it is there and that you may read it."
        ) from error


def _open(source: SourceFiles, progress: Progress) -> Checkpoint:
    path = source.path
    if path.is_dir():
        _refuse_other_folders(path)
        return open_safetensors_folder(source, progress=progress)
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(MAGIC):
        return open_gguf(source, progress=progress)
    if start.startswith((_PICKLE, _ZIP)):
        raise UnsupportedModelError(
            f"{path} looks like a PyTorch checkpoint: a Python pickle, which can run any code when it is "
            f"read. Take the model's safetensors or GGUF files instead. {_READABLE}"
        )
    if start[8:] == b"{" or path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is a single safetensors file. Give its folder, which also has the configuration and the "
            f"tokenizer: {path.parent}"
        )
    raise CheckpointError(
        f"{path} is no checkpoint: it begins with {start!r}, a GGUF file with {MAGIC!r}. {_READABLE}"
    )


def _refuse_other_folders(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(
            f"{folder} is a folder with GGUF files. Give the file itself, for example {ggufs[0]}."
        )
