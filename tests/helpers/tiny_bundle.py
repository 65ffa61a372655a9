"""Bundles of a few bytes, and an exporter that makes them: for tests that never run the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketlm.bundle import GRAPH_NAME, TEMPLATE_NAME, TOKENIZER_NAME, WEIGHTS_NAME, write_manifest
from pocketlm.files import atomic_folder, sha256_of
from pocketlm.manifest import (
    FORMAT_VERSION,
    Dimensions,
    GraphIO,
    KVCacheFormat,
    Manifest,
    Precision,
    Source,
    Tokens,
)
from pocketlm.progress import Progress, silent
from pocketlm.sources import SourceFiles


def tiny_manifest(**changes: Any) -> Manifest:
    """A manifest without files; `changes` replace its fields, `precision` by name."""
    precision = changes.pop("precision", "int8")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        task="text-generation",
        family="llama",
        dimensions=Dimensions(1, 8, 16, 2, 1, 4, 32, 64),
        tokens=Tokens(bos=1, eos=(2,), add_bos=False),
        graph=GraphIO(),
        kv_cache=KVCacheFormat("float32", "batch, kv_heads, capacity, head_dim"),
        precision=Precision(precision, "for tests", ()),
        source=Source("gguf", "tiny.gguf", None, "0" * 64, "F32 × 1"),
        licence=None,
        calibration=None,
        quality=None,
        files={},
        exporter="tests",
    )
    return dataclasses.replace(manifest, **changes)


def write_tiny_bundle(folder: Path, *, weights: bytes = b"weights", **changes: Any) -> Manifest:
    """Fills `folder`, which is created if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GRAPH_NAME).write_bytes(b"graph")
    (folder / WEIGHTS_NAME).write_bytes(weights)
    (folder / TOKENIZER_NAME).write_text('{"version": "1.0"}', encoding="utf-8")
    (folder / TEMPLATE_NAME).write_text("{{ messages }}\r\n", encoding="utf-8", newline="")
    return write_manifest(folder, tiny_manifest(**changes))


class FakeExporter:
    """Stands in for the exporter: copies the source's bytes into a tiny bundle and counts its calls."""

    def __init__(self, before_end: Callable[[Path], None] = lambda folder: None) -> None:
        self.sources: list[SourceFiles] = []
        self.before_end = before_end

    def __call__(
        self,
        source: SourceFiles,
        output: Path,
        *,
        precision: str = "int8",
        max_kl: float | None = None,
        progress: Progress = silent,
    ) -> Manifest:
        self.sources.append(source)
        path = source.path if source.path.is_file() else source.path / "model.safetensors"
        facts = Source("gguf", source.location, source.revision, sha256_of(path), "F32 × 1")
        with atomic_folder(output) as folder:
            manifest = write_tiny_bundle(
                folder, weights=path.read_bytes(), precision=precision, name=source.name, source=facts
            )
            self.before_end(folder)
        return manifest
