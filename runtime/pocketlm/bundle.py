"""A bundle on disk: the folder that holds all that a runtime needs.

    manifest.json        what the exporter promises, with the size and sha256 of every other file
    model.onnx           the graph
    model.onnx.data      its weights, memory-mapped
    tokenizer.json       in the format of the tokenizers library
    chat_template.jinja  only if the model has one
    ngrams.npy           only if it was exported with one: see `ngrams`

The manifest is written last, so a folder without one is no bundle. Files that it does not list are ignored.
"""

from __future__ import annotations

import dataclasses
import stat
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import BundleError
from pocketlm.files import atomic_write, sha256_of
from pocketlm.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest, read_manifest
from pocketlm.ngrams import NGRAMS_NAME, NgramTable
from pocketlm.progress import Progress, silent

GRAPH_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"
TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"

_REMEDY = "Copy the bundle again, or make it again with pocketlm pull --force or pocketlm export."
_REQUIRED = (GRAPH_NAME, WEIGHTS_NAME, TOKENIZER_NAME)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are there; `open_bundle` makes one."""

    folder: Path
    manifest: Manifest

    @property
    def graph_path(self) -> Path:
        return self.folder / GRAPH_NAME

    @property
    def tokenizer_json(self) -> str:
        """The content of tokenizer.json, read on each access. Raises BundleError."""
        return _read_text(self.folder / TOKENIZER_NAME)

    @property
    def chat_template(self) -> str | None:
        """The chat template, read on each access; None if the model has none. Raises BundleError."""
        if TEMPLATE_NAME not in self.manifest.files:
            return None
        return _read_text(self.folder / TEMPLATE_NAME)

    @property
    def ngrams(self) -> NgramTable | None:
        """The table of n-grams to draft from, read on each access; None without one. Raises BundleError."""
        if NGRAMS_NAME not in self.manifest.files:
            return None
        return NgramTable.load(self.folder / NGRAMS_NAME, self.manifest.dimensions.vocabulary)


def open_bundle(folder: Path, *, verify: bool = True, progress: Progress = silent) -> Bundle:
    """The bundle in `folder`, after its files have been checked against the manifest.

    `verify=False` checks that every file is there with the right size, but hashes none: for a caller
    who has just verified it or only lists bundles.

    Raises BundleError if a file is missing, altered or lies outside `folder`, ManifestError if the
    manifest is not sound.
    """
    manifest = read_manifest(folder)
    for name in _REQUIRED:
        if name not in manifest.files:
            raise BundleError(f"{folder / MANIFEST_NAME} does not list {name}. {_REMEDY}")
    for name, entry in manifest.files.items():
        try:
            _check_file(folder, name, entry, verify=verify, progress=progress)
        except OSError as error:
            raise BundleError(f"{folder / name} cannot be read: {error}. Check its permissions.") from error
    return Bundle(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Completes a bundle: hashes the files in `folder`, lists them and writes manifest.json last.

    `manifest.files` is replaced; hidden files are not listed. Returns the manifest as written.

    Raises BundleError if a file that every bundle has is missing, ManifestError if the manifest would
    be refused when it is read, StorageError if it cannot be written.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = {
        path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
        if path.name != MANIFEST_NAME
    }
    if missing := [name for name in _REQUIRED if name not in files]:
        raise BundleError(f"{folder} has no {' and no '.join(missing)}; every bundle has one.")
    complete = dataclasses.replace(manifest, files=files)
    text = complete.to_json()
    parse_manifest(text, str(folder / MANIFEST_NAME))
    atomic_write(folder / MANIFEST_NAME, text)
    return complete


def _check_file(folder: Path, name: str, entry: FileEntry, *, verify: bool, progress: Progress) -> None:
    path = folder / name
    try:
        status = path.stat()
    except FileNotFoundError:
        raise BundleError(f"{path} is missing. {_REMEDY}") from None
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link to {path.resolve()}, outside the bundle. {_REMEDY}")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a regular file. {_REMEDY}")
    if status.st_size != entry.bytes:
        raise BundleError(
            f"{path} has {status.st_size:,} bytes, its manifest says {entry.bytes:,}. {_REMEDY}"
        )
    if verify and (found := sha256_of(path, progress=progress)) != entry.sha256:
        raise BundleError(
            f"{path} is altered: its sha256 is {found}, its manifest says {entry.sha256}. {_REMEDY}"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}. {_REMEDY}") from error
