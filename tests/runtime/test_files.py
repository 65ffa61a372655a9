from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from helpers.tiny_bundle import write_tiny_bundle
from pocketlm import files
from pocketlm.errors import StorageError
from pocketlm.files import (
    atomic_folder,
    atomic_write,
    disk_errors,
    readable_size,
    replace_folder,
    sha256_of,
    sweep_temporaries,
    temporary_sibling,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sha256_reports_every_byte(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "f").write_bytes(data)
    reports: list[tuple[str, int, int, str]] = []
    assert (
        sha256_of(tmp_path / "f", progress=lambda *args: reports.append(args))
        == hashlib.sha256(data).hexdigest()
    )
    assert reports == [("Checking f", 1 << 20, len(data), "B"), ("Checking f", len(data), len(data), "B")]


def test_sha256_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert sha256_of(tmp_path / "f") == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98_362_432, "98.4 MB"),
        (999_960_000, "1.0 GB"),
        (3e12, "3.0 TB"),
    ],
)
def test_readable_size(count: int, text: str) -> None:
    assert readable_size(count) == text


def test_atomic_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "bundle"
    with atomic_folder(destination) as folder:
        assert folder.parent == destination.parent
        assert folder.name.startswith(".bundle.")
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not destination.exists()
    assert names(destination.parent) == ["bundle"]
    assert (destination / "sub" / "b").read_text() == "2"


def test_atomic_folder_replaces_an_earlier_bundle_whole(tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    write_tiny_bundle(destination)
    with atomic_folder(destination) as folder:
        (folder / "new").write_text("1")
    assert names(destination) == ["new"]
    assert names(tmp_path) == ["bundle"]


def test_atomic_folder_keeps_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    write_tiny_bundle(destination, weights=b"old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(destination) as folder:
        (folder / "new").write_text("1")
        raise KeyboardInterrupt
    assert (destination / "model.onnx.data").read_bytes() == b"old"
    assert names(tmp_path) == ["bundle"]


def test_atomic_folder_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


def test_atomic_folder_refuses_a_folder_with_other_files_before_any_work(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "home")
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    refused = pytest.raises(StorageError, match=r"files that belong to no bundle \(thesis\.txt\)")
    with refused, atomic_folder(tmp_path / "home"):
        pytest.fail("the block must not run")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("manifest", ["{", "[]", '{"files": {"thesis.txt": 1}}', '{"format_version": 1}'])
def test_a_foreign_manifest_protects_nothing_and_permits_nothing(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "manifest.json").write_text(manifest)
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="thesis"), atomic_folder(tmp_path / "home"):
        pytest.fail("the block must not run")


def test_atomic_folder_refuses_what_came_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="late"), atomic_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "late").touch()
    assert names(tmp_path) == ["out"]


def test_atomic_folder_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(StorageError, match="is a file, expected a folder"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_a_full_disk_inside_the_block(tmp_path: Path) -> None:
    refused = pytest.raises(StorageError, match=r"out could not be written: the disk is full \(.*B free\)")
    with refused, atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_failing_rename_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    (old / "mine").touch()
    rename = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="broken disk"):
        replace_folder(new, old)
    assert names(old) == ["mine"]
    assert names(tmp_path) == ["new", "old"]


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f"
    atomic_write(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    atomic_write(path, b"\r\n")
    assert path.read_bytes() == b"\r\n"
    assert names(path.parent) == ["f"]


def test_atomic_write_on_a_full_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    atomic_write(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_disk_errors_name_the_setting_and_the_cause(tmp_path: Path) -> None:
    for code in (errno.EACCES, errno.EPERM, errno.EROFS):
        refused = pytest.raises(StorageError, match=r"could not be written: .*HF_HOME moves the cache")
        with refused, disk_errors(tmp_path / "f", setting="HF_HOME"):
            raise OSError(code, "denied", str(tmp_path))


def test_disk_errors_let_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path / "f"):
        raise FileNotFoundError(errno.ENOENT, "gone", "x")
    with pytest.raises(PermissionError), disk_errors(tmp_path / "f"):
        raise PermissionError(errno.EACCES, "denied", "/etc/shadow")


def test_free_space_of_a_disk_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path) -> None:
        raise OSError(errno.ENODEV, "gone")

    monkeypatch.setattr(files.shutil, "disk_usage", gone)
    with pytest.raises(StorageError, match="an unknown amount free"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "full")


def test_sweep_removes_this_target_s_leftovers_only(tmp_path: Path) -> None:
    target = tmp_path / "model-int8"
    folder, file = temporary_sibling(target), temporary_sibling(target)
    other = temporary_sibling(tmp_path / "model-int8.x")
    (folder / "deep").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    (folder / "deep" / "link").symlink_to(outside)
    link = temporary_sibling(target)
    link.symlink_to(outside)
    for path in (file, other, tmp_path / ".model-int8.notours.partial", tmp_path / "model-int8"):
        path.touch()
    sweep_temporaries(target)
    assert names(tmp_path) == sorted([".model-int8.notours.partial", other.name, "model-int8", "outside"])
    assert names(outside) == ["keep"]


def test_sweep_where_there_is_no_folder(tmp_path: Path) -> None:
    sweep_temporaries(tmp_path / "none" / "target")
