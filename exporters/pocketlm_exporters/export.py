"""Checkpoint → fp32 reference → calibrated, quantized, verified bundle."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pocketlm.bundle import GRAPH_NAME, TEMPLATE_NAME, TOKENIZER_NAME, WEIGHTS_NAME, write_manifest
from pocketlm.errors import InvalidSettingError, QualityGateError
from pocketlm.files import atomic_folder
from pocketlm.manifest import (
    FORMAT_VERSION,
    Calibration,
    Dimensions,
    GraphIO,
    KVCacheFormat,
    LayerPrecision,
    Manifest,
    Precision,
    Quality,
)
from pocketlm.progress import Progress, silent
from pocketlm.session import Session
from pocketlm.sources import SourceFiles
from pocketlm.threads import thread_count
from pocketlm.tokenizer import Tokenizer
from pocketlm_exporters import calibrate, texts, verify
from pocketlm_exporters.architectures import architecture_of
from pocketlm_exporters.checkpoint import Checkpoint, open_checkpoint
from pocketlm_exporters.decoder import Array, DecoderConfig, DecoderWeights
from pocketlm_exporters.drafts import add_ngrams
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.embedding import FloatEmbedding, TiedFloatHead
from pocketlm_exporters.graph.linear import FloatLinear, LinearEmitter, TappedLinear
from pocketlm_exporters.processor import WeightBytes, weight_bytes
from pocketlm_exporters.quantize import four_bits, recipe
from pocketlm_exporters.quantize.recorded_inputs import RecordedInputs
from pocketlm_exporters.quantize.rotation import rotate
from pocketlm_exporters.quantize.smoothing import smooth, smoothing_scales

DEFAULT_MAX_KL = {"fp32": 0.0, "int8": 0.02, "int4": 0.1}
"""The quality gate by precision: mean nats per token over the verification text."""

SMOOTHING = 0.4
"""SmoothQuant's alpha for a rotated model, as measured on SmolLM2-135M."""

SMOOTHING_UNROTATED = 0.6
"""The same where activations behind norms have to be smoothed too, as measured on Gemma 3 270M."""

_FINER_PRECISION = {"int4": "int8", "int8": "fp32"}
_FINER_AT_FIRST = 4  # linears that get finer blocks where the gate is missed; then twice as many, and so on


def export(
    source: SourceFiles,
    output: Path,
    *,
    precision: str = "int8",
    max_kl: float | None = None,
    weights: WeightBytes | None = None,
    ngrams: int = 0,
    progress: Progress = silent,
) -> Manifest:
    """Writes the bundle `output` from a checkpoint, whole or not at all; returns its manifest.

    `max_kl` is the quality gate: the mean divergence from the fp32 graph, in nats per token. Where int8
    or int4 misses it, the most sensitive linears are stored more finely until it is met. `weights` is how the
    bytes of int8 weights are stored, by default as this machine likes them; the results are the same.
    `ngrams` is how many tokens the finished model generates for a table to draft from; 0 makes none.

    Raises CheckpointError or UnsupportedModelError for the source, QualityGateError if the gate cannot be
    met, InvalidSettingError, and StorageError for a disk that is full or not writable.
    """
    if precision not in DEFAULT_MAX_KL:
        raise InvalidSettingError(f"The precision is {precision!r}; expected {' or '.join(DEFAULT_MAX_KL)}.")
    gate = DEFAULT_MAX_KL[precision] if max_kl is None else max_kl
    if not gate >= 0:
        raise InvalidSettingError(f"max_kl is {max_kl!r}; a number of nats from 0 on is expected.")
    if ngrams < 0:
        raise InvalidSettingError(f"ngrams is {ngrams!r}; a number of tokens from 0 on is expected.")
    with atomic_folder(output) as folder:
        job = _Export(open_checkpoint(source, progress=progress), folder, progress)
        if precision == "fp32":
            manifest = job.fp32()
        elif precision == "int4":
            manifest = job.int4(gate)
        else:
            manifest = job.int8(gate, weights or weight_bytes())
        return add_ngrams(folder, manifest, ngrams, progress) if ngrams else manifest


@dataclass(frozen=True)
class _Prepared:
    """A decoder that is ready to be rounded, and what calibration knows of its linears' inputs."""

    weights: DecoderWeights
    ranges: dict[str, float]  # by path, where the range is fixed
    largest: dict[str, Array]  # (inputs) by path
    calibration: Calibration


@dataclass(frozen=True)
class _Met:
    """A quality gate that was met: how well, with which precisions, and how many linears had to be finer."""

    quality: Quality
    layers: tuple[LayerPrecision, ...]
    finer: int


class _Export:
    """One export under way into `folder`."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._progress = progress
        self._architecture = architecture_of(checkpoint)
        self._weights = self._architecture.read(checkpoint)
        self._tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.tokens)
        self._tokenizer.stream()  # refuses a decoder that no answer could be read with, before the work
        self._io = GraphIO(hidden_rows="hidden_rows", hidden="hidden")
        self._dimensions = _dimensions(self._weights)
        self._threads = thread_count()

    def fp32(self) -> Manifest:
        """The reference as a bundle, compared with itself: its perplexity belongs into the manifest too."""
        self._write_float(self._weights, self._folder)
        session = self._session(self._folder)
        layers = [LayerPrecision(path, "fp32", 0.0) for path in (recipe.EMBEDDING, *self._weights.linears)]
        precision = Precision("fp32", "float32 weights and activations", tuple(layers))
        return self._finish(precision, None, self._compare(session, session))

    def int8(self, gate: float, weights: WeightBytes) -> Manifest:
        """Eight bits, finer where the gate asks for it."""
        prepared = self._prepare()
        met = self._meet(
            gate,
            "int8",
            recipe.by_sensitivity(prepared.weights, prepared.largest),
            lambda finer: self._write_int8(prepared, finer, weights),
        )
        described = recipe.describe(self._weights.rotatable, met.finer, weights)
        return self._finish(Precision("int8", described, met.layers), prepared.calibration, met.quality)

    def int4(self, gate: float) -> Manifest:
        """Four bits, eight where the gate asks for it."""
        windows = self._windows(texts.CALIBRATION, calibrate.WINDOW)
        rounded = self._round_to_four_bits(windows)
        met = self._meet(
            gate, "int4", four_bits.by_damage(rounded), lambda finer: self._write_int4(rounded, finer)
        )
        calibration = Calibration(texts.CALIBRATION, sum(map(len, windows)), smoothing=None)
        precision = Precision("int4", four_bits.describe(met.finer), met.layers)
        return self._finish(precision, calibration, met.quality)

    def _meet(
        self,
        gate: float,
        precision: str,
        sensitive: Sequence[str],
        write: Callable[[Sequence[str]], tuple[LayerPrecision, ...]],
    ) -> _Met:
        """Calls `write` with ever more of the `sensitive` linears until what it wrote meets the gate.

        Raises QualityGateError if that does not happen.
        """
        best = float("inf")
        with self._scratch("reference") as folder:
            self._write_float(self._weights, folder)
            reference = self._session(folder)
            for finer in _ever_more(sensitive):
                layers = write(finer)
                quality = self._compare(reference, self._session(self._folder))
                best = min(best, quality.kl_mean)
                if quality.kl_mean <= gate:
                    break
            else:
                raise QualityGateError(
                    f"{precision} diverges from fp32 by {best:.4f} nats per token at best, the quality gate "
                    f"is {gate:g}. Export with --max-kl {best * 1.05:.2g} if that is good enough, or with "
                    f"--precision {_FINER_PRECISION[precision]}."
                )
            del reference  # Windows removes no file that is mapped
        return _Met(quality, layers, len(finer))

    def _round_to_four_bits(self, windows: Sequence[Sequence[int]]) -> dict[str, four_bits.FourBits]:
        """All linears in four bits, by what they read in `windows`.

        The residual stream stays as it is: a checkpoint that was stored in four bits keeps its blocks.
        """
        weights = self._weights
        with self._scratch("calibration") as folder:
            self._write_float(weights, folder, tapped=True)
            inputs = RecordedInputs(folder)
            calibrate.visit_inputs(
                folder / GRAPH_NAME,
                weights.config,
                self._io,
                windows,
                inputs.add,
                threads=self._threads,
                progress=self._progress,
            )
            return four_bits.round_linears(
                weights,
                lambda path: inputs.gram(path, weights.linears[path].inputs),
                self._steps("Quantizing"),
            )

    def _prepare(self) -> _Prepared:
        """Rotation, calibration, smoothing: what makes rounding cheap and leaves the function as it is.

        A residual stream that cannot be rotated is smoothed behind its norms instead.
        """
        rotated = self._weights.rotatable
        weights = rotate(self._weights) if rotated else self._weights
        windows = self._windows(texts.CALIBRATION, calibrate.WINDOW)
        with self._scratch("calibration") as folder:
            self._write_float(weights, folder, tapped=True)
            statistics = calibrate.calibrate(
                folder / GRAPH_NAME,
                weights.config,
                self._io,
                windows,
                threads=self._threads,
                progress=self._progress,
            )
        fixed = [path for path in weights.linears if rotated and recipe.can_have_fixed_range(path)]
        alpha = SMOOTHING if rotated else SMOOTHING_UNROTATED
        scales = smoothing_scales(weights, statistics.largest, alpha, behind_norms=not rotated)
        return _Prepared(
            weights=smooth(weights, scales),
            ranges={path: statistics.best_range(path) for path in fixed},
            largest={path: largest / scales.get(path, 1) for path, largest in statistics.largest.items()},
            calibration=Calibration(texts.CALIBRATION, sum(map(len, windows)), alpha),
        )

    def _write_float(self, weights: DecoderWeights, folder: Path, *, tapped: bool = False) -> None:
        config = weights.config
        embedding = FloatEmbedding(weights.embedding, config.vocabulary, config.hidden)
        linears: dict[str, LinearEmitter] = {
            path: FloatLinear(each) for path, each in weights.linears.items()
        }
        if tapped:
            linears = {
                path: TappedLinear(each, weights.linears[path].inputs) for path, each in linears.items()
            }
        linears.setdefault("head", TiedFloatHead(embedding))
        graph = self._architecture.decoder(weights, embedding, linears, self._io)
        self._save(graph, folder, "Writing the fp32 graph")

    def _write_int8(
        self, prepared: _Prepared, finer: Sequence[str], weights: WeightBytes
    ) -> tuple[LayerPrecision, ...]:
        precision = recipe.int8(prepared.ranges, frozenset(finer))
        quantized = recipe.quantize(
            prepared.weights, precision, prepared.ranges, weights, self._steps("Quantizing")
        )
        decoder = self._architecture.decoder
        graph = decoder(prepared.weights, quantized.embedding, quantized.linears, self._io)
        self._save(graph, self._folder, "Writing the int8 graph")
        return quantized.report

    def _write_int4(
        self, rounded: Mapping[str, four_bits.FourBits], finer: Sequence[str]
    ) -> tuple[LayerPrecision, ...]:
        quantized = four_bits.quantize(self._weights, rounded, frozenset(finer))
        graph = self._architecture.decoder(self._weights, quantized.embedding, quantized.linears, self._io)
        self._save(graph, self._folder, "Writing the int4 graph")
        return quantized.report

    def _save(self, graph: GraphBuilder, folder: Path, task: str) -> None:
        written = 0

        def count(_: int, total: int) -> None:
            nonlocal written
            written += 1
            self._progress(task, written, total, "weights")

        graph.save(folder, GRAPH_NAME, WEIGHTS_NAME, on_weight=count)

    def _steps(self, task: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(task, done, total, "weights")

    def _session(self, folder: Path) -> Session:
        return Session(folder / GRAPH_NAME, self._dimensions, self._io, threads=self._threads)

    def _compare(self, reference: Session, candidate: Session) -> Quality:
        windows = self._windows(texts.VERIFICATION, verify.WINDOW)
        return verify.compare(reference, candidate, windows, text=texts.VERIFICATION, progress=self._progress)

    def _windows(self, text: str, size: int) -> list[list[int]]:
        return texts.windows(text, self._tokenizer, min(size, self._dimensions.context_length))

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """A folder for what must not stay, inside the temporary folder: a later run sweeps both together."""
        folder = self._folder / f".{name}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, precision: Precision, calibration: Calibration | None, quality: Quality) -> Manifest:
        checkpoint = self._checkpoint
        (self._folder / TOKENIZER_NAME).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        if checkpoint.chat_template is not None:
            (self._folder / TEMPLATE_NAME).write_text(checkpoint.chat_template, encoding="utf-8")
        return write_manifest(
            self._folder,
            Manifest(
                format_version=FORMAT_VERSION,
                name=checkpoint.name,
                task="text-generation",
                family=self._weights.config.family,
                dimensions=self._dimensions,
                tokens=checkpoint.tokens,
                graph=self._io,
                kv_cache=KVCacheFormat(
                    "float32", "batch, kv_heads, capacity, head_dim", _windows(self._weights.config)
                ),
                precision=precision,
                source=checkpoint.source,
                licence=checkpoint.licence,
                calibration=calibration,
                quality=quality,
                files={},
                exporter=f"pocketlm {importlib.metadata.version('pocketlm')}",
                parameters=_parameters(self._weights),
            ),
        )


def _ever_more(sensitive: Sequence[str]) -> Iterator[Sequence[str]]:
    """Which linears to store finely: none, then the most sensitive few, twice as many each time, all."""
    yield ()
    count = _FINER_AT_FIRST
    while count < len(sensitive):
        yield sensitive[:count]
        count *= 2
    yield sensitive


def _windows(config: DecoderConfig) -> tuple[int | None, ...] | None:
    windows = tuple(layer.sliding_window for layer in config.attention)
    return windows if any(windows) else None


def _parameters(weights: DecoderWeights) -> int:
    """Weights of all matrices and norms. Biases, which few models have, are not counted."""
    of = weights.config
    attention = 2 * of.hidden * of.head_dim * (of.heads + of.kv_heads)
    tables = 2 if "head" in weights.linears else 1
    matrices = of.layers * (attention + 3 * of.hidden * of.intermediate) + tables * of.vocabulary * of.hidden
    return matrices + sum(norm.size for norm in weights.norms.values())


def _dimensions(weights: DecoderWeights) -> Dimensions:
    config = weights.config
    return Dimensions(
        layers=config.layers,
        hidden=config.hidden,
        intermediate=config.intermediate,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocabulary,
        context_length=config.context_length,
    )
