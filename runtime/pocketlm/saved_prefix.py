"""A prefix on disk, so that a long system prompt is computed once and not at every start.

    one line of JSON    format, version, bundle, ids, shape, dtype; first and shortest, where tokens are
                        released (see `StoredPrefix`): there are zeros in their place
    keys and values     as in memory
    32 bytes            sha256 of the line and of each piece's sha256; a piece is 4 MiB of keys and values

The pieces are there to be hashed side by side: a whole file's sha256 would take longer than reading it.

The values are what this machine's processor and ONNX Runtime computed. Others would compute other last bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.bundle import GRAPH_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from pocketlm.errors import PocketlmError
from pocketlm.files import atomic_file
from pocketlm.manifest import Dimensions, Manifest
from pocketlm.prefix_store import THREADS, StoredPrefix, own_array

VERSION = 1

_FORMAT = "pocketlm prefix"
_DTYPE = "<f4"
_PIECE_BYTES = 1 << 22
_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 1 << 26
_REMEDY = "Save the prefix again."


class SavedPrefixError(PocketlmError):
    """A file that is no saved prefix, is damaged or belongs to another bundle."""


def fingerprint(manifest: Manifest) -> str:
    """What ties a prefix to its bundle: "smollm2-135m int8 0f3a…", a hash of graph, weights and tokenizer.

    The manifest is that of a whole bundle, as `open_bundle` returns it.
    """
    digest = manifest.digest(GRAPH_NAME, WEIGHTS_NAME, TOKENIZER_NAME)
    return f"{manifest.name} {manifest.precision.name} {digest[:16]}"


def save(path: Path, prefix: StoredPrefix, fingerprint: str) -> None:
    """Writes `prefix`, computed by the bundle of that fingerprint, so that `path` is whole or as it was.

    Raises StorageError if the disk is full or the folder not writable.
    """
    header = _header(fingerprint, prefix.ids, prefix.keys_values.shape, prefix.first, prefix.shortest)
    content = _bytes_of(np.ascontiguousarray(prefix.keys_values, _DTYPE))
    digest = _digest(header, _pieces(content))
    with atomic_file(path) as file:
        file.write(header)
        file.write(content)
        file.write(digest)


def load(path: Path, fingerprint: str, dimensions: Dimensions) -> StoredPrefix:
    """The prefix saved in `path` by the bundle of that fingerprint, of which `dimensions` are the sizes.

    Raises SavedPrefixError if there is none, or it is truncated, altered, of another bundle or of a newer
    pocketlm.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path, fingerprint, dimensions)
    except OSError as error:
        raise SavedPrefixError(
            f"{path} cannot be read: {error}. Check the path, or save the prefix."
        ) from error


def _read(file: BufferedReader, path: Path, fingerprint: str, dimensions: Dimensions) -> StoredPrefix:
    header = file.readline(_MAX_HEADER_BYTES)
    facts = _checked_facts(header, path, fingerprint)
    ids = _checked_ids(facts, path, dimensions.vocabulary)
    first, shortest = _checked_first(facts, path, dimensions.layers, len(ids))
    shape = (dimensions.layers, 2, dimensions.kv_heads, len(ids), dimensions.head_dim)
    if header != _header(fingerprint, ids, shape, first, shortest):
        raise SavedPrefixError(f"{path} is altered: its first line is not as it was written. {_REMEDY}")
    expected = len(header) + 4 * int(np.prod(shape)) + _DIGEST_BYTES
    if (size := os.fstat(file.fileno()).st_size) != expected:
        raise SavedPrefixError(
            f"{path} has {size:,} bytes, but {len(ids):,} tokens of this model take {expected:,}. {_REMEDY}"
        )
    keys_values = own_array(shape)
    # Each piece is hashed while the next one is read.
    digest = _digest(header, _filled(_pieces(_bytes_of(keys_values)), file))
    if digest != file.read():
        raise SavedPrefixError(f"{path} is altered: its content does not have its sha256. {_REMEDY}")
    return StoredPrefix(tuple(ids), keys_values, first, shortest)


def _checked_facts(header: bytes, path: Path, fingerprint: str) -> dict[str, Any]:
    try:
        facts = json.loads(header)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise SavedPrefixError(f"{path} is no saved prefix, or its first line is damaged. {_REMEDY}")
    if facts.get("version") != VERSION:
        raise SavedPrefixError(
            f"{path} has format version {facts.get('version')!r}; this pocketlm reads {VERSION}. {_REMEDY}"
        )
    if facts.get("bundle") != fingerprint:
        raise SavedPrefixError(
            f"{path} was saved with the bundle {facts.get('bundle')!r}, but this one is {fingerprint!r}, to "
            "which its values mean nothing. Load it with that bundle, or save the prefix again with this one."
        )
    return facts


def _checked_ids(facts: Mapping[str, Any], path: Path, vocabulary: int) -> list[int]:
    ids = facts.get("ids")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise SavedPrefixError(f"{path} is altered: it holds no token ids of this model. {_REMEDY}")
    return ids


def _checked_first(
    facts: Mapping[str, Any], path: Path, layers: int, tokens: int
) -> tuple[tuple[int, ...], int]:
    first, shortest = facts.get("first", []), facts.get("shortest", 0)
    whole = [first, shortest] == [[], 0]
    if not whole and not (
        isinstance(first, list)
        and len(first) == layers
        and type(shortest) is int
        and all(type(each) is int and 0 <= each < shortest <= tokens for each in first)
    ):
        raise SavedPrefixError(f"{path} is altered: what it lacks is not as it was written. {_REMEDY}")
    return tuple(first), shortest


def _header(
    fingerprint: str, ids: Sequence[int], shape: Sequence[int], first: Sequence[int], shortest: int
) -> bytes:
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "version": VERSION,
        "bundle": fingerprint,
        "ids": list(ids),
        "shape": list(shape),
        "dtype": _DTYPE,
    }
    if first:
        facts |= {"first": list(first), "shortest": shortest}
    return json.dumps(facts, separators=(",", ":")).encode() + b"\n"


def _digest(header: bytes, pieces: Iterable[memoryview]) -> bytes:
    with ThreadPoolExecutor(THREADS) as executor:
        digests = list(executor.map(lambda piece: hashlib.sha256(piece).digest(), pieces))
    return hashlib.sha256(hashlib.sha256(header).digest() + b"".join(digests)).digest()


def _bytes_of(array: NDArray[np.float32]) -> memoryview:
    return array.data.cast("B")


def _pieces(content: memoryview) -> Iterator[memoryview]:
    return (content[begin : begin + _PIECE_BYTES] for begin in range(0, len(content), _PIECE_BYTES))


def _filled(pieces: Iterable[memoryview], file: BufferedReader) -> Iterator[memoryview]:
    for piece in pieces:
        file.readinto(piece)
        yield piece
