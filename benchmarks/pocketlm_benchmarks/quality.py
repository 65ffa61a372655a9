"""What a bundle's precision cost: as its exporter measured it, and on a text of the user's own."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from pocketlm.bundle import TOKENIZER_NAME, Bundle, open_bundle
from pocketlm.errors import InvalidSettingError
from pocketlm.manifest import Manifest
from pocketlm.progress import Progress, silent
from pocketlm.session import Session
from pocketlm.tokenizer import Tokenizer
from pocketlm_benchmarks.result import QualityFigures
from pocketlm_exporters import texts, verify

LEAST_TOKENS = 64
"""A shorter text says nothing about a model."""


def manifest_quality(manifest: Manifest) -> QualityFigures | None:
    """The quality on the text that the exporter ships; None if the bundle was not verified."""
    quality = manifest.quality
    return None if quality is None else QualityFigures(text_sha256=None, **dataclasses.asdict(quality))


def measure_quality(
    candidate: Path, reference: Path, text: Path, *, threads: int, progress: Progress = silent
) -> QualityFigures:
    """Perplexity, divergence and top-1 agreement of the bundle `candidate` on a UTF-8 text.

    `reference` is the fp32 bundle of the same weights. The text is cut into windows of `verify.WINDOW`
    tokens, or of the model's context where that is shorter, each from an empty context. All of it is used;
    only its name and its sha256 are recorded.

    Raises InvalidSettingError for a reference that is not fp32 or not of the same weights and tokenizer, and
    for a text that cannot be read or is shorter than `LEAST_TOKENS`; BundleError for a damaged bundle.
    """
    content, sha256 = _read(text)
    first, second = (open_bundle(folder, progress=progress) for folder in (reference, candidate))
    _check_reference(first, second)
    windows = _windows(content, second, text.name)
    sessions = [
        Session(bundle.graph_path, bundle.manifest.dimensions, bundle.manifest.graph, threads=threads)
        for bundle in (first, second)
    ]
    quality = verify.compare(sessions[0], sessions[1], windows, text=text.name, progress=progress)
    return QualityFigures(text_sha256=sha256, **dataclasses.asdict(quality))


def _read(path: Path) -> tuple[str, str]:
    """The text and the sha256 of its bytes. Line ends stay as they are, so that both fit each other."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig"), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise InvalidSettingError(f"the text {path} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise InvalidSettingError(
            f"the text {path} is not UTF-8: {error.reason} at byte {error.start:,}. Save it as UTF-8."
        ) from None


def _check_reference(reference: Bundle, candidate: Bundle) -> None:
    ours, theirs = candidate.manifest, reference.manifest
    if theirs.precision.name != "fp32":
        raise InvalidSettingError(
            f"the reference {reference.folder} is {theirs.precision.name}, expected fp32. Make one with: "
            "pocketlm pull MODEL --precision fp32"
        )
    for what, their, our in (
        ("source", theirs.source.sha256, ours.source.sha256),
        ("tokenizer", theirs.files[TOKENIZER_NAME].sha256, ours.files[TOKENIZER_NAME].sha256),
        ("vocabulary", theirs.dimensions.vocabulary, ours.dimensions.vocabulary),
        ("special tokens", theirs.tokens, ours.tokens),
    ):
        if their != our:
            raise InvalidSettingError(
                f"the reference {reference.folder} is not the fp32 form of {candidate.folder}: its {what} is "
                f"{their}, expected {our}. Make both from the same source with the same pocketlm."
            )


def _windows(content: str, bundle: Bundle, name: str) -> list[list[int]]:
    manifest = bundle.manifest
    tokenizer = Tokenizer(bundle.tokenizer_json, bundle.chat_template, manifest.tokens)
    windows = texts.split(content, tokenizer, min(verify.WINDOW, manifest.dimensions.context_length))
    tokens = sum(map(len, windows))
    if tokens < LEAST_TOKENS:
        raise InvalidSettingError(
            f"the text {name} has {tokens} tokens; at least {LEAST_TOKENS} are expected, some thousands give "
            "a figure to rely on."
        )
    return windows
