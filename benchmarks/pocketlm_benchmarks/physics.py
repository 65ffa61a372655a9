"""What bounds a model on a device: the memory's bandwidth or the processor's arithmetic.

A decode step reads every weight once for one token, so memory bounds it; prefill uses each weight for many
tokens, so arithmetic does (the roofline model, Williams et al., 2009). Two shares say how near a measurement
comes to these bounds:

    MBU = (bytes of weights + bytes of the KV cache at the mean context) / tpot / measured read bandwidth
    MFU = operations on weights a second in prefill / measured peak of the arithmetic that the bundle uses

MFU is the model's, not the implementation's (PaLM, arXiv 2204.02311, appendix B): two operations for each
weight and prompt token, and the head's for the one row that becomes a token. Attention's products are left
out, so a long prompt lowers it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pocketlm.errors import ManifestError
from pocketlm.manifest import Dimensions, Manifest
from pocketlm_benchmarks.peaks import Peaks
from pocketlm_benchmarks.result import OURS, Case, Measurement, Physics

_FLOAT32 = 4  # bytes

# From which share of a bound on a measurement is called bound by it, and from which on partly.
BOUND, PARTLY = 0.65, 0.35
_BUSY = "the device was busy or slowed down while its peak was measured"


@dataclass(frozen=True)
class Work:
    """What the model costs, from its manifest.

    Biases are left out (they are thousandths), and so are sliding windows, which the manifest does not state:
    behind a longer context than its window a model reads less of the cache.
    """

    weight_bytes: int  # that a decode step reads, scales and norms included
    kv_bytes_per_token: int
    ops_per_prompt_token: int  # all linears but the head
    ops_of_head: int  # for one row
    arithmetic: Literal["int8", "fp32"]

    def prefill_ops(self, tokens: float) -> float:
        """Operations on weights for a prompt, of which one row gets logits."""
        return tokens * self.ops_per_prompt_token + self.ops_of_head

    def decode_bytes(self, context: float) -> float:
        """Bytes that a decode step reads with `context` tokens in the cache."""
        return self.weight_bytes + context * self.kv_bytes_per_token


def work_of(manifest: Manifest) -> Work:
    """Bytes and operations of the bundle's linears. Raises ManifestError for a layer that is not known."""
    sizes = manifest.dimensions
    layers = {layer.path: layer.precision for layer in manifest.precision.layers}
    embedding = layers.pop("embedding", None)
    if embedding is not None:  # of which a step reads one row, unless the table serves as the head too
        layers.setdefault("head", embedding)
    if "head" not in layers:
        raise ManifestError(
            "The manifest lists neither a head nor an embedding. Export or pull the model again."
        )
    shapes = {path: _shape(path, sizes) for path in layers}
    weights = {path: outputs * inputs for path, (outputs, inputs) in shapes.items()}
    norms = (2 * sizes.layers + 1) * sizes.hidden * _FLOAT32
    return Work(
        weight_bytes=norms + sum(_stored_bytes(layers[path], *shapes[path]) for path in layers),
        kv_bytes_per_token=2 * sizes.layers * sizes.kv_heads * sizes.head_dim * _FLOAT32,
        ops_per_prompt_token=2 * (sum(weights.values()) - weights["head"]),
        ops_of_head=2 * weights["head"],
        # Weights of four bits are multiplied as bytes too.
        arithmetic="fp32" if manifest.precision.name == "fp32" else "int8",
    )


def physics(
    peaks: Peaks, manifest: Manifest, cases: Sequence[Case], measurements: Sequence[Measurement]
) -> Physics:
    """Our engine's measurements of the synthetic grid beside the device's peaks.

    Workloads and cases with several queries at once are left out: their steps have no single context.
    Raises ManifestError for a bundle with a layer that is not known.
    """
    work = work_of(manifest)
    peak = peaks.fp32_flops_per_s if work.arithmetic == "fp32" else peaks.int8_ops_per_s
    single = {case.name: case for case in cases if case.concurrent == 1}
    ours = [m for m in measurements if m.engine == OURS and m.case in single]
    decodes = [_Decode.of(single[m.case], m, work, peaks) for m in ours if _tells(m, single, "decode")]
    prefills = [_Prefill.of(single[m.case], m, work) for m in ours if _tells(m, single, "prefill")]
    return Physics(
        threads=peaks.threads,
        read_bytes_per_s=peaks.read_bytes_per_s,
        int8_ops_per_s=peaks.int8_ops_per_s,
        fp32_flops_per_s=peaks.fp32_flops_per_s,
        bytes_per_token=work.weight_bytes,
        kv_bytes_per_token=work.kv_bytes_per_token,
        ops_per_prompt_token=float(work.ops_per_prompt_token),
        mbu={each.case: each.mbu for each in decodes},
        mfu={} if peak is None else {each.case: each.ops_per_s / peak for each in prefills},
        limits=[
            *_decode_limits(decodes, work),
            *_prefill_limits(prefills, work, peak),
            *_turning_point(work, peaks, peak),
        ],
    )


@dataclass(frozen=True)
class _Decode:
    """A decode case as measured."""

    case: str
    context: float  # mean tokens in the cache
    tokens_per_s: float
    bytes_per_s: float
    mbu: float

    @classmethod
    def of(cls, case: Case, measurement: Measurement, work: Work, peaks: Peaks) -> _Decode:
        tpot_s = measurement.metrics["tpot_s"].median
        context = case.prompt_tokens + case.new_tokens / 2
        rate = work.decode_bytes(context) / tpot_s
        return cls(case.name, context, 1 / tpot_s, rate, rate / peaks.read_bytes_per_s)


@dataclass(frozen=True)
class _Prefill:
    """A prefill case as measured."""

    case: str
    prompt_tokens: float
    tokens_per_s: float
    ops_per_s: float

    @classmethod
    def of(cls, case: Case, measurement: Measurement, work: Work) -> _Prefill:
        tokens_per_s = measurement.metrics["prefill_tokens_per_s"].median
        ops_per_s = work.prefill_ops(case.prompt_tokens) / case.prompt_tokens * tokens_per_s
        return cls(case.name, case.prompt_tokens, tokens_per_s, ops_per_s)


def _tells(measurement: Measurement, cases: dict[str, Case], kind: Literal["decode", "prefill"]) -> bool:
    metric = {"decode": "tpot_s", "prefill": "prefill_tokens_per_s"}[kind]
    return cases[measurement.case].kind == kind and metric in measurement.metrics


def _decode_limits(decodes: Sequence[_Decode], work: Work) -> Iterator[str]:
    """Of the shortest context, where the weights weigh most, and of the longest."""
    ordered = sorted(decodes, key=lambda each: each.context)
    if not ordered:
        return
    short, deep = ordered[0], ordered[-1]
    yield f"{_decode_share(short)}: {_decode_verdict(short.mbu)}"
    if deep is not short:
        cached, weights = deep.context * work.kv_bytes_per_token, work.weight_bytes
        yield (
            f"Behind {deep.context:,.0f} tokens of context a step reads {cached / 1e6:,.1f} MB of cache "
            f"beside {weights / 1e6:,.1f} MB of weights: decode runs at {_rate(deep.tokens_per_s)} instead "
            f"of {_rate(short.tokens_per_s)} tok/s, and reads at {deep.mbu:.0%} of what the memory gives."
        )


def _decode_share(decode: _Decode) -> str:
    return (
        f"Decode at {_rate(decode.tokens_per_s)} tok/s ({decode.case}) reads {decode.bytes_per_s / 1e9:.1f} "
        f"GB/s, {decode.mbu:.0%} of what the memory gives"
    )


def _decode_verdict(mbu: float) -> str:
    if mbu > 1:
        return f"the caches keep part of the weights from one step to the next, or {_BUSY}."
    if mbu >= BOUND:
        return "it is bound by memory; fewer bytes a weight would help, faster arithmetic would not."
    if mbu >= PARTLY:
        return (
            "memory is the largest part of a step, and arithmetic on single rows and the start of each "
            "operation the rest; fewer bytes a weight and faster cores would both help."
        )
    return (
        "memory is not what bounds it; arithmetic on single rows, attention and the start of each operation "
        "are, so faster cores would help and fewer bytes a weight hardly."
    )


def _prefill_limits(prefills: Sequence[_Prefill], work: Work, peak: float | None) -> Iterator[str]:
    """Of the longest prompt, where arithmetic counts most."""
    if not prefills:
        return
    if peak is None:
        yield f"The {work.arithmetic} peak could not be measured here: prefill stands beside nothing."
        return
    longest = max(prefills, key=lambda each: each.prompt_tokens)
    mfu = longest.ops_per_s / peak
    yield (
        f"Prefill at {_rate(longest.tokens_per_s)} tok/s ({longest.case}) does "
        f"{_rate(longest.ops_per_s / 1e9)} billion {work.arithmetic} operations a second on weights, "
        f"{mfu:.0%} of what the processor gives: {_prefill_verdict(mfu)}"
    )


def _prefill_verdict(mfu: float) -> str:
    if mfu > 1:
        return f"{_BUSY}."
    if mfu >= BOUND:
        return "it is bound by matrix products; more or faster cores would help, more bandwidth would not."
    if mfu >= PARTLY:
        return (
            "matrix products are a good part of it, and attention, norms and rounding activations the rest; "
            "more or faster cores would help."
        )
    return (
        "matrix products of weights are the smaller part of it; attention, norms, rounding activations and "
        "small matrices take the time."
    )


def _turning_point(work: Work, peaks: Peaks, peak: float | None) -> Iterator[str]:
    """The roofline's ridge, in rows: below it a step waits for memory, above it for arithmetic."""
    if peak is None:
        return
    ops_per_row = work.ops_per_prompt_token + work.ops_of_head
    rows = (work.weight_bytes / peaks.read_bytes_per_s) / (ops_per_row / peak)
    yield (
        "A step reads the weights once for all of its rows (sequences of a batch, drafted tokens): up to "
        f"about {max(1.0, rows):,.0f} of them it need take no longer than for one; then arithmetic adds up."
    )


def _shape(path: str, sizes: Dimensions) -> tuple[int, int]:
    """Outputs and inputs of the linear at `path`, see pocketlm_exporters.decoder.DecoderWeights."""
    attended = sizes.heads * sizes.head_dim
    shapes = {
        "qkv": (attended + 2 * sizes.kv_heads * sizes.head_dim, sizes.hidden),
        "output": (sizes.hidden, attended),
        "gate_up": (2 * sizes.intermediate, sizes.hidden),
        "down": (sizes.hidden, sizes.intermediate),
        "head": (sizes.vocabulary, sizes.hidden),
    }
    kind = path.rpartition(".")[2]
    if kind not in shapes:
        raise ManifestError(
            f"The manifest lists the layer {path!r}, whose size this pocketlm does not know; expected are "
            f"{', '.join(shapes)}. Upgrade pocketlm."
        )
    return shapes[kind]


def _stored_bytes(precision: str, outputs: int, inputs: int) -> int:
    """A linear's weights and scales, see pocketlm_exporters.quantize.rounding."""
    if precision == "fp32":
        return outputs * inputs * _FLOAT32
    if precision in {"int8-static", "int8-row"}:
        return outputs * (inputs + _FLOAT32)
    if match := re.fullmatch(r"int(\d+)-block(\d+)", precision):
        bits, size = map(int, match.groups())
        blocks_each = -(-inputs // size)
        zero_points = -(-blocks_each // 2) if bits == 4 else 0  # two in a byte; eight bits are symmetric
        return outputs * (blocks_each * (size * bits // 8 + _FLOAT32) + zero_points)
    raise ManifestError(
        f"The manifest stores a layer as {precision!r}, whose size this pocketlm does not know. "
        "Upgrade pocketlm."
    )


def _rate(tokens_per_s: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"
