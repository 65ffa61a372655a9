"""Prefixes on disk: the same bits come back, and nothing else does."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_bundle import tiny_manifest
from pocketlm import saved_prefix
from pocketlm.errors import StorageError
from pocketlm.manifest import Dimensions, FileEntry, Manifest
from pocketlm.prefix_store import StoredPrefix
from pocketlm.saved_prefix import SavedPrefixError, fingerprint, load, save

DIMENSIONS = Dimensions(
    layers=2,
    hidden=8,
    intermediate=16,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocabulary=32,
    context_length=64,
)
BUNDLE = "tiny int8 0123456789abcdef"


def prefix_of(*ids: int) -> StoredPrefix:
    values = np.random.default_rng(0).standard_normal((2, 2, 1, len(ids), 4)).astype(np.float32)
    return StoredPrefix(ids, values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "system.prefix"
    save(path, prefix_of(3, 1, 2), BUNDLE)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bytes are there to be altered."""
    path = tmp_path_factory.mktemp("saved") / "system.prefix"
    save(path, prefix_of(3, 1, 2), BUNDLE)
    return path


@pytest.mark.parametrize("piece_bytes", [1 << 22, 64, 7])
def test_the_same_bits_come_back(tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_prefix, "_PIECE_BYTES", piece_bytes)
    prefix = prefix_of(*range(20))
    save(tmp_path / "a" / "p", prefix, BUNDLE)
    loaded = load(tmp_path / "a" / "p", BUNDLE, DIMENSIONS)
    assert loaded.ids == prefix.ids
    assert loaded.keys_values.dtype == np.float32
    assert loaded.keys_values.tobytes() == prefix.keys_values.tobytes()
    assert not loaded.keys_values.flags.writeable
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["p"]


def test_values_that_lie_apart_in_memory(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.float32).reshape(2, 2, 1, 4, 4)[..., ::2, :]
    save(tmp_path / "p", StoredPrefix((1, 2), values), BUNDLE)
    np.testing.assert_array_equal(load(tmp_path / "p", BUNDLE, DIMENSIONS).keys_values, values)


def test_every_bit_pattern(tmp_path: Path) -> None:
    values = np.full((2, 2, 1, 1, 4), np.nan, np.float32)
    values.flat[:3] = [np.inf, -0.0, 1e-45]
    save(tmp_path / "p", StoredPrefix((1,), values), BUNDLE)
    assert load(tmp_path / "p", BUNDLE, DIMENSIONS).keys_values.tobytes() == values.tobytes()


def test_the_layout_of_the_file(path: Path) -> None:
    line, _, rest = path.read_bytes().partition(b"\n")
    assert json.loads(line) == {
        "format": "pocketlm prefix",
        "version": 1,
        "bundle": BUNDLE,
        "ids": [3, 1, 2],
        "shape": [2, 2, 1, 3, 4],
        "dtype": "<f4",
    }
    payload = prefix_of(3, 1, 2).keys_values.tobytes()
    hashes = hashlib.sha256(line + b"\n").digest() + hashlib.sha256(payload).digest()
    assert rest == payload + hashlib.sha256(hashes).digest()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_altered_byte_is_refused(saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    altered = saved.with_name("altered")
    altered.write_bytes(content)
    with pytest.raises(SavedPrefixError, match=r"[Ss]ave the prefix"):
        load(altered, BUNDLE, DIMENSIONS)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_length_is_refused(saved: Path, data: st.DataObject) -> None:
    content = saved.read_bytes()
    keep = data.draw(st.integers(0, len(content)))
    more = data.draw(st.binary(min_size=int(keep == len(content)), max_size=3))
    if content[keep:].startswith(more) and len(content) == keep + len(more):
        return  # the file as it was
    altered = saved.with_name("altered")
    altered.write_bytes(content[:keep] + more)
    with pytest.raises(SavedPrefixError):
        load(altered, BUNDLE, DIMENSIONS)


def test_another_bundle_is_named(path: Path) -> None:
    with pytest.raises(SavedPrefixError) as caught:
        load(path, "other int4 fedcba9876543210", DIMENSIONS)
    message = str(caught.value)
    assert BUNDLE in message
    assert "other int4 fedcba9876543210" in message
    assert "Load it with that bundle, or save the prefix again" in message


def rewrite(path: Path, **changes: object) -> None:
    """Changes the first line, and leaves the rest and its hash."""
    line, _, rest = path.read_bytes().partition(b"\n")
    facts = {**json.loads(line), **changes}
    path.write_bytes(json.dumps(facts, separators=(",", ":")).encode() + b"\n" + rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has format version 2; this pocketlm reads 1"),
        ({"version": None}, "has format version None"),
        ({"format": "other"}, "is no saved prefix"),
        ({"ids": [3, 1, 32]}, "holds no token ids of this model"),
        ({"ids": [3, 1, -1]}, "holds no token ids of this model"),
        ({"ids": [3, 1, True]}, "holds no token ids of this model"),
        ({"ids": []}, "holds no token ids of this model"),
        ({"ids": "abc"}, "holds no token ids of this model"),
        ({"ids": [3, 1, 9]}, "content does not have its sha256"),
        ({"ids": [3, 1, 2, 2], "shape": [2, 2, 1, 4, 4]}, "bytes, but 4 tokens of this model take"),
        ({"shape": [1, 4, 1, 3, 4]}, "its first line is not as it was written"),
        ({"dtype": "<f2"}, "its first line is not as it was written"),
        ({"more": 1}, "its first line is not as it was written"),
    ],
)
def test_another_first_line_is_refused(path: Path, changes: dict[str, object], message: str) -> None:
    rewrite(path, **changes)
    with pytest.raises(SavedPrefixError, match=message):
        load(path, BUNDLE, DIMENSIONS)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]\n", b"\xff\xfe\n", b"[" * 100_000, b'{"format": 1}\n', os.urandom(500)]
)
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(SavedPrefixError, match="is no saved prefix"):
        load(tmp_path / "p", BUNDLE, DIMENSIONS)


def test_other_dimensions_are_refused(path: Path) -> None:
    with pytest.raises(SavedPrefixError, match="first line"):
        load(path, BUNDLE, dataclasses.replace(DIMENSIONS, layers=3))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SavedPrefixError, match="cannot be read"):
        load(tmp_path / "none", BUNDLE, DIMENSIONS)


def test_a_full_disk_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save(path, prefix_of(1), BUNDLE)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


class TestFingerprint:
    FILES = ("chat_template.jinja", "model.onnx", "model.onnx.data", "tokenizer.json")

    def manifest(self, **changes: str) -> Manifest:
        hashes = dict.fromkeys(self.FILES, "0" * 64) | changes
        return tiny_manifest(files={name: FileEntry(1, sha256) for name, sha256 in hashes.items()})

    def test_says_which_bundle(self) -> None:
        assert fingerprint(self.manifest()).startswith("tiny int8 ")

    @pytest.mark.parametrize("name", FILES[1:])
    def test_is_tied_to_graph_weights_and_tokenizer(self, name: str) -> None:
        assert fingerprint(self.manifest(**{name: "1" * 64})) != fingerprint(self.manifest())

    def test_is_not_tied_to_the_chat_template(self) -> None:
        changed = self.manifest(**{"chat_template.jinja": "1" * 64})
        assert fingerprint(changed) == fingerprint(self.manifest())

    def test_tells_files_with_exchanged_content_apart(self) -> None:
        one = self.manifest(**{"model.onnx": "1" * 64})
        other = self.manifest(**{"model.onnx.data": "1" * 64})
        assert fingerprint(one) != fingerprint(other)
