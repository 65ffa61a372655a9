from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from helpers.tiny_bundle import tiny_manifest, write_tiny_bundle
from pocketlm.bundle import open_bundle, write_manifest
from pocketlm.errors import BundleError, ManifestError
from pocketlm.manifest import read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_write_and_open(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.manifest == read_manifest(folder)
    assert list(bundle.manifest.files) == [
        "chat_template.jinja",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    ]
    assert bundle.manifest.files["model.onnx.data"].bytes == len(b"weights")
    assert bundle.graph_path.read_bytes() == b"graph"
    assert json.loads(bundle.tokenizer_json) == {"version": "1.0"}
    assert bundle.chat_template is not None
    assert "messages" in bundle.chat_template


def test_a_template_that_is_not_listed_does_not_count(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    write_manifest(folder, tiny_manifest())
    (folder / "chat_template.jinja").write_text("slipped in later")
    assert open_bundle(folder).chat_template is None


def test_hidden_and_extra_files_are_no_part_of_it(folder: Path) -> None:
    (folder / ".DS_Store").touch()
    assert ".DS_Store" not in write_manifest(folder, tiny_manifest()).files
    (folder / "notes.txt").write_text("mine")
    open_bundle(folder)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(tmp_path)


def test_a_missing_file(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data is missing.*pocketlm pull --force"):
        open_bundle(folder, verify=False)


def test_another_size(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"weight")
    with pytest.raises(BundleError, match=r"model\.onnx\.data has 6 bytes, its manifest says 7"):
        open_bundle(folder, verify=False)


def test_another_content_of_the_same_size(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"wEights")
    open_bundle(folder, verify=False)
    with pytest.raises(
        BundleError, match=r"model\.onnx\.data is altered: its sha256 is [0-9a-f]{64}, its manifest"
    ):
        open_bundle(folder)


def test_a_link_out_of_the_bundle(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.onnx.data", tmp_path / "elsewhere")
    (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(folder)


def test_a_link_to_the_bundle_and_inside_it_is_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx.data").rename(folder / "blob")
    (folder / "model.onnx.data").symlink_to("blob")
    (tmp_path / "link").symlink_to(folder)
    assert open_bundle(tmp_path / "link").folder == tmp_path / "link"


def test_no_regular_file(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(folder)


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *, progress: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pocketlm.bundle.sha256_of", broken)
    with pytest.raises(BundleError, match=r"cannot be read: .*Input/output error"):
        open_bundle(folder)


def test_a_tokenizer_that_is_no_text(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff")
    write_manifest(folder, tiny_manifest())
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        _ = open_bundle(folder).tokenizer_json


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_every_bundle_has_these(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    listed = {key: entry for key, entry in manifest.files.items() if key != name}
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=listed).to_json())
    with pytest.raises(BundleError, match=f"does not list {name}"):
        open_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"has no {name}; every bundle has one"):
        write_manifest(folder, manifest)


def test_a_manifest_that_nobody_could_read_is_not_written(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="task is 'dreaming'"):
        write_manifest(folder, tiny_manifest(task="dreaming"))
    assert not (folder / "manifest.json").exists()


def test_progress_of_the_hashes(folder: Path) -> None:
    tasks: list[str] = []
    open_bundle(
        folder, progress=lambda task, done, total, unit: tasks.append(f"{task} {done}/{total} {unit}")
    )
    assert "Checking model.onnx.data 7/7 B" in tasks
