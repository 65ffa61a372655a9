"""The bundle's manifest: what an exporter promises and a runtime relies on.

`manifest.json` is the one contract between the two. It states facts; nothing is inferred from file
names. Reading is strict: an unknown field, a missing field or a wrong type is refused with its path,
because a field that a runtime does not understand may change what the graph means. Only a field that has a
default here may be missing: bundles that were exported before it was there stay readable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pocketlm.errors import BundleError, ManifestError, did_you_mean

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Dimensions:
    """Sizes of the decoder, in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int  # tokens, as trained


@dataclass(frozen=True)
class Tokens:
    """Special token ids. Generation ends at any id of `eos`."""

    bos: int | None
    eos: tuple[int, ...]
    add_bos: bool  # whether raw text is encoded with `bos` in front


@dataclass(frozen=True)
class GraphIO:
    """Names of the graph's inputs and outputs.

    | name | type | shape |
    | --- | --- | --- |
    | input_ids | int64 | (batch, tokens) |
    | past_lengths | int32 | (batch): tokens in the cache before this step |
    | logit_rows | int64 | (rows): which of the batch × tokens positions get logits, or hidden states |
    | hidden_rows | int64 | (1): the first so many of these rows get hidden states, the others logits |
    | past_key, past_value, present_key, present_value | kv_cache.type | kv_cache.layout |
    | logits | float32 | (rows − hidden_rows, vocabulary) |
    | hidden | float32 | (hidden_rows, hidden): what Hugging Face calls `last_hidden_state` |

    hidden_rows may be left unfed, and is zero then. Bundles exported before there were hidden states have
    neither name.

    `{layer}` in a cache name stands for 0 … layers − 1. Past and present are to be bound to one buffer, which
    is then written in place. With tokens in the cache, a batch has one row or one token a row.
    """

    input_ids: str = "input_ids"
    past_lengths: str = "past_lengths"
    logit_rows: str = "logit_rows"
    past_key: str = "past_key.{layer}"
    past_value: str = "past_value.{layer}"
    present_key: str = "present_key.{layer}"
    present_value: str = "present_value.{layer}"
    logits: str = "logits"
    hidden_rows: str | None = None
    hidden: str | None = None


@dataclass(frozen=True)
class KVCacheFormat:
    type: Literal["float32"]
    layout: Literal["batch, kv_heads, capacity, head_dim"]
    windows: tuple[int | None, ...] | None = None
    """By layer, how many tokens a token sees, itself included; None: all before it. None for the whole tuple:
    no layer has a window."""


@dataclass(frozen=True)
class LayerPrecision:
    """How one linear (or the embedding) is stored, and what rounding cost it."""

    path: str
    precision: str
    worst_error: float  # largest |w − dequantized w| as a share of the largest |w|


@dataclass(frozen=True)
class Precision:
    name: Literal["fp32", "int8", "int4"]
    recipe: str
    layers: tuple[LayerPrecision, ...]


@dataclass(frozen=True)
class Source:
    """Where the weights came from: enough to fetch them again and know that they are the same."""

    kind: Literal["gguf", "safetensors"]
    location: str  # repository, package or file name; never a path of the machine that exported
    revision: str | None
    sha256: str  # of the file, or of the sorted list of "sha256  name" lines where there are several
    format: str  # the stored weight types, for example "Q4_1 × 210, F32 × 61, Q8_0 × 1"


@dataclass(frozen=True)
class Calibration:
    text: str  # which text
    tokens: int
    smoothing: float | None  # SmoothQuant's alpha; None: not smoothed


@dataclass(frozen=True)
class Quality:
    """Against the fp32 graph of the same weights, teacher-forced on the same text."""

    text: str
    tokens: int
    perplexity: float
    perplexity_fp32: float
    kl_mean: float  # nats per token, KL(fp32 ‖ this)
    kl_p99: float
    top1_agreement: float  # share of positions with the same most likely token


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    format_version: int
    name: str
    task: Literal["text-generation"]
    family: str
    dimensions: Dimensions
    tokens: Tokens
    graph: GraphIO
    kv_cache: KVCacheFormat
    precision: Precision
    source: Source
    licence: str | None
    calibration: Calibration | None
    quality: Quality | None
    files: dict[str, FileEntry]
    exporter: str
    parameters: int | None = None  # of the model as it was trained; a head that is the embedding counts once

    @property
    def bytes(self) -> int:
        """Size of the bundle's files, without the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())

    def digest(self, *names: str) -> str:
        """sha256 of the lines "sha256  name" of these files, in this order; of all of them by name, without
        any. The same for the same files."""
        listing = "".join(f"{self.files[name].sha256}  {name}\n" for name in names or sorted(self.files))
        return hashlib.sha256(listing.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`.

    Raises BundleError if there is none and ManifestError if it does not follow the schema.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST_NAME}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: str, where: str = MANIFEST_NAME) -> Manifest:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ManifestError(f"{where} is not valid JSON: {error}. Export or pull the model again.") from None
    if not isinstance(data, dict):
        raise ManifestError(f"{where} holds {_kind(data)}, expected an object.")
    # The version comes first: fields of a newer format would only be misreported as unknown.
    version = data.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise ManifestError(
            f"{where} has format version {version}; this pocketlm reads up to {FORMAT_VERSION}. "
            "Upgrade pocketlm, or export the model with this version."
        )
    if version != FORMAT_VERSION:
        raise ManifestError(f"{where} has format version {version!r}, expected {FORMAT_VERSION}.")
    manifest: Manifest = parse_value(Manifest, data, "", where)
    _check_windows(manifest, where)
    if (manifest.graph.hidden is None) != (manifest.graph.hidden_rows is None):
        raise ManifestError(
            f"{where}: graph has one of hidden and hidden_rows; both or neither are expected."
        )
    for name in manifest.files:
        # A name with a separator would let a downloaded manifest point outside its folder.
        if not name or name in {".", "..", MANIFEST_NAME} or set(name) & set("/\\:\0"):
            raise ManifestError(f"{where} lists the file name {name!r}; a plain file name is expected.")
    return manifest


def _check_windows(manifest: Manifest, where: str) -> None:
    windows, layers = manifest.kv_cache.windows, manifest.dimensions.layers
    if windows is None:
        return
    if len(windows) != layers:
        raise ManifestError(f"{where}: kv_cache.windows has {len(windows)} layers, dimensions has {layers}.")
    for window in windows:
        if window is not None and window < 1:
            raise ManifestError(f"{where}: kv_cache.windows has {window}; a number of tokens is expected.")


def parse_value(kind: Any, value: Any, path: str, where: str) -> Any:
    """`value`, as JSON has it, as `kind`: a dataclass, a tuple, a plain type, a union with None, a Literal.

    Raises ManifestError with the `path` of what is wrong in the document `where`.
    """
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(typing.cast("type[Any]", kind), value, path, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return parse_value(inner, value, path, where)
    if origin is Literal:
        if value in args:
            return value
        raise ManifestError(f"{where}: {path} is {value!r}, expected {' or '.join(map(repr, args))}.")
    if origin is tuple and isinstance(value, list):
        return tuple(parse_value(args[0], item, f"{path}[{i}]", where) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: parse_value(args[1], item, f"{path}.{key}", where) for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    expected = {tuple: "a list", dict: "an object"}.get(origin or kind, getattr(kind, "__name__", str(kind)))
    raise ManifestError(f"{where}: {path} is {_kind(value)}, expected {expected}.")


def _parse_dataclass(kind: type[T], value: Any, path: str, where: str) -> T:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: {path} is {_kind(value)}, expected an object.")
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise ManifestError(
                f"{where}: unknown field {prefix}{key}.{did_you_mean(key, hints)} "
                "A newer pocketlm may have written it: upgrade, or export the model again."
            )
    for field in dataclasses.fields(typing.cast("type[Any]", kind)):
        if field.name not in value and field.default is dataclasses.MISSING:
            raise ManifestError(
                f"{where}: the field {prefix}{field.name} is missing. Export or pull the model again."
            )
    return kind(**{key: parse_value(hints[key], item, prefix + key, where) for key, item in value.items()})


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")
