"""What weights can be made from, and the sources that lie on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from pocketlm.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from pocketlm.manifest import FORMAT_VERSION, MANIFEST_NAME
from pocketlm.progress import Progress

_CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_INDEX_NAME = "model.safetensors.index.json"
_ADVICE = {
    ".bin": "It is a PyTorch pickle, which can run code when it is read",
    ".pt": "It is a PyTorch pickle, which can run code when it is read",
    ".pth": "It is a PyTorch pickle, which can run code when it is read",
    ".ckpt": "It is a PyTorch pickle, which can run code when it is read",
    ".onnx": "It is a graph without a manifest",
    ".safetensors": "Give the folder that holds it, together with config.json and tokenizer.json",
}


@dataclass(frozen=True)
class SourceFiles:
    """A trained model on this machine, ready to be exported."""

    path: Path  # a .gguf file, or a folder with config.json, *.safetensors and tokenizer.json
    name: str  # short name of the bundle: a-z, 0-9, ".", "_", "-"
    location: str  # repository, package or file name; never a path of this machine
    revision: str | None
    licence: str | None


class Request(Protocol):
    """A source that was asked for, before anything is fetched."""

    @property
    def name(self) -> str:
        """The bundle's short name."""

    @property
    def folder(self) -> str:
        """The cached bundle's folder name, without the precision."""

    @property
    def asked(self) -> str | None:
        """What `pocketlm pull` takes to get it, or None if only a path of this machine would do."""

    @property
    def precision(self) -> str | None:
        """The default precision, if the source has its own."""

    @property
    def pinned(self) -> bool:
        """Whether an equal fingerprint means equal weights; a branch can move without it."""

    def fingerprint(self) -> str:
        """Tells this source from every other and from an earlier state of itself, without the network."""

    def fetch(self, progress: Progress) -> SourceFiles:
        """Brings the weights onto this machine."""


def short_name(text: str) -> str:
    """`text` as the name of a bundle: "SmolLM2 135M" becomes "smollm2-135m"."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:80] or "model"


def fingerprint_of(*facts: object) -> str:
    """SHA-256 over the facts and the bundle format, so that another format is another bundle."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *facts]).encode()).hexdigest()


def checkpoint_files(names: Iterable[str], where: str) -> list[str]:
    """Those of a checkpoint's top-level file `names` that an export reads, small ones first.

    Raises UnsupportedModelError if `where` (for the message) is no checkpoint that pocketlm can read.
    """
    present = sorted(name for name in names if "/" not in name)
    weights = [name for name in present if fnmatch(name, "model*.safetensors")]
    # Other files in that format are adapters, or the same weights once more in the layout of another program.
    weights = weights or [name for name in present if name.endswith(".safetensors")]
    if _INDEX_NAME in present:
        weights = [name for name in weights if name != "model.safetensors"] or weights
    missing = [name for name in ("config.json", "tokenizer.json") if name not in present]
    if not weights:
        missing.insert(0, "*.safetensors")
    if missing:
        found = [name for name in present if not name.startswith(".")]
        raise UnsupportedModelError(
            f"{where} has no {' and no '.join(missing)}; it holds "
            f"{', '.join(found[:8]) or 'no files'}{', …' if len(found) > 8 else ''}. pocketlm reads .gguf "
            "files and folders with config.json, tokenizer.json and *.safetensors."
        )
    extra = [_INDEX_NAME] if _INDEX_NAME in present else []
    return [name for name in _CONFIG_FILES if name in present] + extra + weights


@dataclass(frozen=True)
class LocalRequest:
    """A .gguf file or a checkpoint folder on this machine.

    Its cached bundle is keyed by the path, and is made again when the size or the modification time of
    a file that the export reads changes. (Hashing the content instead would cost seconds a start.)
    """

    path: Path

    @property
    def name(self) -> str:
        return short_name(self.path.stem if self.path.is_file() else self.path.resolve().name)

    @property
    def folder(self) -> str:
        return f"{self.name}-{fingerprint_of('path', str(self.path.resolve()))[:8]}"

    @property
    def asked(self) -> str | None:
        return None

    @property
    def precision(self) -> str | None:
        return None

    @property
    def pinned(self) -> bool:
        return True

    def fingerprint(self) -> str:
        facts = []
        for path in self._files():
            status = path.stat()
            facts.append([path.name, status.st_size, status.st_mtime_ns])
        return fingerprint_of("local", str(self.path.resolve()), facts)

    def fetch(self, progress: Progress) -> SourceFiles:
        """Raises CheckpointError or UnsupportedModelError if there is no checkpoint at the path."""
        self._files()
        return SourceFiles(self.path, self.name, self.path.resolve().name, None, None)

    def _files(self) -> list[Path]:
        if self.path.is_dir():
            try:
                names = [path.name for path in self.path.iterdir()]
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read: {error}. Check its permissions."
                ) from error
            return [self.path / name for name in checkpoint_files(names, str(self.path))]
        if not _is_gguf(self.path):
            advice = _ADVICE.get(self.path.suffix.lower(), "It does not begin as a GGUF file does")
            raise UnsupportedModelError(
                f"{self.path} is no model file that pocketlm reads. {advice}. Expected a .gguf file, a "
                "checkpoint folder (config.json, tokenizer.json, *.safetensors) or a bundle folder."
            )
        return [self.path]


def local_request(path: Path) -> LocalRequest:
    """Raises ModelNotFoundError if nothing is there, CheckpointError if it is a finished bundle."""
    if not path.exists():
        raise ModelNotFoundError(f"there is no file or folder {path}. Check the path.")
    if (path / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{path} is a bundle already, expected a checkpoint. Run or copy it as it is.")
    return LocalRequest(path)


def _is_gguf(path: Path) -> bool:
    """By its suffix (what is inside is the reader's to judge) or, for a file without one, its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Check its permissions.") from error
