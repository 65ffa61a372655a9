"""From a name to a bundle: weights on this machine, and the cache.

Downloads are in test_package_index.py and test_huggingface.py.
"""

from __future__ import annotations

import errno
import os
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from helpers.processes import pulling, wait_for
from helpers.tiny_bundle import FakeExporter, write_tiny_bundle
from pocketlm import cache, hub
from pocketlm.bundle import open_bundle
from pocketlm.cache import read_origin
from pocketlm.errors import (
    BundleError,
    CheckpointError,
    InvalidSettingError,
    ManifestError,
    MissingExtraError,
    ModelNotFoundError,
    StorageError,
    UnsupportedModelError,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def exporter(home: Path, monkeypatch: pytest.MonkeyPatch) -> FakeExporter:
    fake = FakeExporter()
    monkeypatch.setattr(hub, "_exporter", lambda: fake)
    return fake


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "My Model.Q8_0.gguf"
    path.write_bytes(b"GGUF weights")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "Checkpoint"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(name)
    return folder


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.name.endswith(".partial")]


# What a name stands for


def test_a_bundle_folder_is_used_as_it_is(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    write_tiny_bundle(folder, precision="fp32")
    assert hub.find_bundle(folder) == folder
    assert hub.find_bundle(str(folder), precision="fp32") == folder
    with pytest.raises(InvalidSettingError, match="of precision fp32, but int8 was asked for"):
        hub.find_bundle(folder, precision="int8")
    (folder / "model.onnx").write_bytes(b"Graph")
    with pytest.raises(BundleError, match=r"model\.onnx is altered"):
        hub.find_bundle(folder)
    assert not home.exists()


def test_a_bundle_is_no_checkpoint(home: Path, tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    for act in (hub.fetch_source, hub.pull):
        with pytest.raises(CheckpointError, match="is a bundle already"):
            act(tmp_path / "bundle")


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLM_HOME", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.home() == tmp_path / "here"
    monkeypatch.setenv("POCKETLM_HOME", "")
    assert hub.home() == tmp_path / ".cache" / "pocketlm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", r"no model 'smollm2-135'\. Did you mean smollm2-135m.*Known names: .*hf:ORG/REPO"),
        ("SmolLM2_135M", "Did you mean smollm2-135m"),
        ("qwertz", r"no model 'qwertz'\. Known names: "),
        ("", "no model ''"),
        ("x" * 5000, "no model 'xxx.*…'"),
        ("~nobody-of-that-name/x", "no file or folder"),
        ("./missing.gguf", r"no file or folder '\./missing\.gguf'. Check the path\.$"),
        ("missing.gguf", "no file or folder"),
        ("HuggingFaceTB/SmolLM2-360M", "no file or folder.*write hf:HuggingFaceTB/SmolLM2-360M"),
        ("https://huggingface.co/a/b", "is an address. For the Hugging Face Hub write hf:ORG/REPO"),
        ("hf:justone", "'hf:justone' does not name a model of the Hugging Face Hub. Expected hf:ORG/REPO"),
        ("hf:a/b:model.bin", "does not name a model"),
        ("hf:a/b:../x.gguf", "does not name a model"),
        ("hf:../../etc", "does not name a model"),
        ("hf:a/b@x y", "does not name a model"),
        (Path("missing"), "no file or folder missing"),
    ],
)
def test_unknown_names(exporter: FakeExporter, name: str | Path, message: str) -> None:
    for act in (hub.find_bundle, hub.pull, hub.fetch_source):
        with pytest.raises(ModelNotFoundError, match=message):
            act(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", "x", "PyTorch pickle.*Expected a .gguf file, a checkpoint folder"),
        ("model.PT", "x", "PyTorch pickle"),
        ("model.onnx", "x", "graph without a manifest"),
        ("model.safetensors", "x", "Give the folder that holds it"),
        ("readme", "x", "does not begin as a GGUF file does"),
    ],
)
def test_files_of_the_wrong_kind(
    exporter: FakeExporter, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    for act in (hub.find_bundle, hub.fetch_source):
        with pytest.raises(UnsupportedModelError, match=message):
            act(tmp_path / name)


def test_folders_that_are_no_checkpoint(exporter: FakeExporter, tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UnsupportedModelError, match=r"has no \*\.safetensors and no config\.json and no tok.*no files"
    ):
        hub.fetch_source(tmp_path / "empty")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(
        UnsupportedModelError, match=r"no \*\.safetensors; it holds config\.json, pytorch_model\.bin"
    ):
        hub.fetch_source(checkpoint)


def test_files_that_cannot_be_read(
    exporter: FakeExporter, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = checkpoint / "blob"
    blob.write_text("x")

    def denied(path: Path, *args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "iterdir", denied)
    for path in (blob, checkpoint):
        with pytest.raises(
            CheckpointError, match=r"cannot be read: .*Permission denied.*Check its permissions"
        ):
            hub.fetch_source(path)


def test_local_sources(home: Path, gguf: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hub.fetch_source(gguf)
    assert source == hub.SourceFiles(gguf, "my-model.q8_0", "My Model.Q8_0.gguf", None, None)
    source = hub.fetch_source(str(checkpoint))
    assert source == hub.SourceFiles(checkpoint, "checkpoint", "Checkpoint", None, None)
    blob = gguf.rename(gguf.with_name("sha256-0123"))  # as another program stores it
    assert hub.fetch_source(blob).name == "sha256-0123"
    monkeypatch.chdir(checkpoint)
    assert hub.fetch_source(".").name == "checkpoint"
    assert hub.fetch_source(".").location == "Checkpoint"


# The cache


def test_a_source_is_exported_once(exporter: FakeExporter, home: Path, gguf: Path) -> None:
    folder = hub.find_bundle(gguf)
    assert folder.parent == home / "bundles"
    assert open_bundle(folder).manifest.name == "my-model.q8_0"
    assert hub.find_bundle(str(gguf)) == hub.pull(gguf) == folder
    assert len(exporter.sources) == 1
    assert hub.pull(gguf, force=True) == folder
    assert len(exporter.sources) == 2
    assert leftovers(home) == []
    assert str(gguf.parent) not in (folder / "origin.json").read_text()


def test_each_precision_has_its_bundle(exporter: FakeExporter, gguf: Path) -> None:
    int8, fp32 = hub.find_bundle(gguf), hub.find_bundle(gguf, precision="fp32")
    assert int8 != fp32
    assert [bundle.manifest.precision.name for bundle in hub.cached_bundles()] == ["fp32", "int8"]
    with pytest.raises(InvalidSettingError, match="precision is 'int3', expected fp32 or int8"):
        hub.find_bundle(gguf, precision="int3")


def test_a_changed_file_is_exported_again(exporter: FakeExporter, gguf: Path) -> None:
    folder = hub.find_bundle(gguf)
    before = gguf.stat()
    gguf.write_bytes(b"GGUF Weights")
    os.utime(gguf, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert hub.find_bundle(gguf) == folder
    assert (folder / "model.onnx.data").read_bytes() == b"GGUF Weights"


def test_a_changed_checkpoint_is_exported_again(exporter: FakeExporter, checkpoint: Path) -> None:
    folder = hub.find_bundle(checkpoint)
    (checkpoint / "notes.txt").write_text("no part of the checkpoint")
    assert hub.find_bundle(checkpoint) == folder
    assert len(exporter.sources) == 1
    (checkpoint / "config.json").write_text("another")
    hub.find_bundle(checkpoint)
    assert len(exporter.sources) == 2


def test_files_of_one_name_do_not_meet(exporter: FakeExporter, tmp_path: Path) -> None:
    folders = []
    for content in (b"GGUF one", b"GGUF two"):
        path = tmp_path / content[-3:].decode() / "model.gguf"
        path.parent.mkdir()
        path.write_bytes(content)
        folders.append(hub.find_bundle(path))
    assert [(folder / "model.onnx.data").read_bytes() for folder in folders] == [b"GGUF one", b"GGUF two"]


def test_another_bundle_format_is_another_bundle(
    exporter: FakeExporter, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.find_bundle(gguf)
    monkeypatch.setattr("pocketlm.sources.FORMAT_VERSION", 99)
    hub.find_bundle(gguf)
    assert len(exporter.sources) == 2


@pytest.mark.parametrize("origin", ["", "[]", "{}", '{"asked": null, "fingerprint": 1, "revision": null}'])
def test_a_bundle_of_unknown_origin_is_made_again(exporter: FakeExporter, gguf: Path, origin: str) -> None:
    folder = hub.find_bundle(gguf)
    (folder / "origin.json").write_text(origin)
    hub.find_bundle(gguf)
    assert len(exporter.sources) == 2
    assert read_origin(folder) is not None


def test_a_damaged_bundle_is_reported_and_made_again_by_pull(
    exporter: FakeExporter, gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = hub.find_bundle(gguf)
    (folder / "model.onnx").write_bytes(b"Graph")
    command = f"pocketlm pull '{gguf}' --force"
    with pytest.raises(BundleError, match=rf"model\.onnx is altered.*{command}"):
        hub.find_bundle(gguf)
    assert hub.pull(gguf) == folder
    assert "damaged and is made again" in caplog.text
    assert hub.find_bundle(gguf) == folder
    assert len(exporter.sources) == 2


def test_the_command_that_repairs_names_the_precision(exporter: FakeExporter, gguf: Path) -> None:
    (hub.find_bundle(gguf, precision="fp32") / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ManifestError, match=r"format version 99.* --precision fp32 --force"):
        hub.find_bundle(gguf, precision="fp32")


def test_a_failed_export_leaves_nothing_and_keeps_the_old_bundle(
    exporter: FakeExporter, home: Path, gguf: Path
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    exporter.before_end = fail
    with pytest.raises(StorageError, match="the disk is full"):
        hub.pull(gguf)
    assert hub.cached_bundles() == []
    assert leftovers(home) == []
    exporter.before_end = lambda folder: None
    folder = hub.pull(gguf)
    exporter.before_end = fail
    with pytest.raises(StorageError):
        hub.pull(gguf, force=True)
    assert hub.find_bundle(gguf) == folder
    assert leftovers(home) == []


def test_an_exporter_of_another_mind(exporter: FakeExporter, home: Path, gguf: Path) -> None:
    def exported_as_fp32(*args: object, **options: object) -> object:
        return FakeExporter.__call__(exporter, *args, **{**options, "precision": "fp32"})  # type: ignore[arg-type]

    hub_exporter = pytest.MonkeyPatch()
    with hub_exporter.context() as patch:
        patch.setattr(hub, "_exporter", lambda: exported_as_fp32)
        with pytest.raises(BundleError, match="made a bundle of precision fp32, expected int8"):
            hub.pull(gguf)
    assert hub.cached_bundles() == []


def test_a_cache_that_may_not_be_written(exporter: FakeExporter, home: Path, gguf: Path) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"could not be written: (Not a directory|File exists)"):
        hub.pull(gguf)


def test_no_exporter(home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "entry_points", lambda **selection: [])
    with pytest.raises(
        MissingExtraError, match=r'Converting a checkpoint needs.*pip install "pocketlm\[export\]"'
    ):
        hub.pull(gguf)
    broken = EntryPoint("export", "no_such_package_at_all:export", "pocketlm.exporter")
    monkeypatch.setattr(hub, "entry_points", lambda **selection: [broken])
    with pytest.raises(MissingExtraError):
        hub.pull(gguf)


def test_the_entry_point_is_the_exporter(home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def points(**selection: str) -> list[EntryPoint]:
        asked.append(selection)
        return [EntryPoint("export", "helpers.tiny_bundle:FakeExporter.__name__", "pocketlm.exporter")]

    monkeypatch.setattr(hub, "entry_points", points)
    assert hub._exporter() == "FakeExporter"  # type: ignore[comparison-overlap]
    assert asked == [{"group": "pocketlm.exporter", "name": "export"}]


# Names of cached bundles, listing, removing


def test_a_cached_bundle_goes_by_its_name(exporter: FakeExporter, gguf: Path, tmp_path: Path) -> None:
    folder = hub.find_bundle(gguf)
    assert hub.find_bundle("my-model.q8_0") == hub.find_bundle(folder.name) == folder
    with pytest.raises(ModelNotFoundError):
        hub.find_bundle("my-model.q8_0", precision="fp32")
    fp32 = hub.find_bundle(gguf, precision="fp32")
    assert hub.find_bundle("my-model.q8_0") == folder
    assert hub.find_bundle("my-model.q8_0", precision="fp32") == fp32
    other = tmp_path / "other" / gguf.name
    other.parent.mkdir()
    other.write_bytes(b"GGUF other")
    hub.find_bundle(other)
    with pytest.raises(
        ModelNotFoundError, match=r"stands for several cached bundles: my-model.*Use one of these"
    ):
        hub.find_bundle("my-model.q8_0")
    assert hub.find_bundle(folder.name) == folder
    with pytest.raises(ModelNotFoundError, match="no model"):
        hub.pull(folder.name)  # only its path would tell where the weights are


def test_listing_leaves_out_what_is_damaged(exporter: FakeExporter, home: Path, gguf: Path) -> None:
    assert hub.cached_bundles() == []
    folder = hub.find_bundle(gguf)
    (home / "bundles" / ".hidden").mkdir()
    (home / "bundles" / "stray").touch()
    assert [bundle.folder for bundle in hub.cached_bundles()] == [folder]
    (folder / "manifest.json").unlink()
    assert hub.cached_bundles() == []


def test_remove(exporter: FakeExporter, home: Path, gguf: Path) -> None:
    int8, fp32 = hub.find_bundle(gguf), hub.find_bundle(gguf, precision="fp32")
    assert hub.remove(gguf, precision="int8") == [int8]
    assert [bundle.folder for bundle in hub.cached_bundles()] == [fp32]
    assert hub.remove("my-model.q8_0") == [fp32]
    assert hub.cached_bundles() == []
    assert leftovers(home) == []
    assert gguf.exists()
    with pytest.raises(ModelNotFoundError, match=r"no bundle of 'my-model\.q8_0'\. It holds: nothing"):
        hub.remove("my-model.q8_0")


def test_remove_what_is_damaged_and_what_lost_its_source(exporter: FakeExporter, gguf: Path) -> None:
    folder = hub.find_bundle(gguf)
    gguf.unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(ModelNotFoundError):
        hub.remove(folder.name, precision="fp32")
    assert hub.remove(folder.name, precision="int8") == [folder]


def test_remove_touches_nothing_outside(
    exporter: FakeExporter, home: Path, gguf: Path, tmp_path: Path
) -> None:
    folder = hub.find_bundle(gguf)
    outside = tmp_path / "outside"
    write_tiny_bundle(outside)
    (home / "bundles" / "linked-int8").symlink_to(outside)
    for name in (
        "..",
        "../..",
        ".",
        "",
        str(outside),
        outside,
        f"../bundles/{folder.name}",
        "hf:a/b",
        "smollm2-135m",
    ):
        with pytest.raises(
            ModelNotFoundError, match=r"the cache holds no bundle of .*It holds: my-model\.q8_0, tiny"
        ):
            hub.remove(name)
    assert hub.remove("linked-int8") == [home / "bundles" / "linked-int8"]
    assert open_bundle(outside)
    assert not (home / "bundles" / "linked-int8").is_symlink()
    assert hub.find_bundle(gguf) == folder


def test_remove_suggests_near_names(exporter: FakeExporter, gguf: Path) -> None:
    hub.find_bundle(gguf)
    with pytest.raises(ModelNotFoundError, match=r"'my-model' at int8\. Did you mean my-model\.q8_0"):
        hub.remove("my-model", precision="int8")


# Several processes


def test_two_processes_make_one_bundle(home: Path, gguf: Path, tmp_path: Path) -> None:
    with pulling(str(gguf), str(tmp_path)) as one, pulling(str(gguf), str(tmp_path)) as other:
        outputs = [process.communicate(timeout=60) for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    assert (tmp_path / "exports").read_text() == "one\n"
    open_bundle(Path(outputs[0][0].strip()))
    assert leftovers(home) == []


def test_a_killed_pull_leaves_nothing_that_is_trusted(exporter: FakeExporter, home: Path, gguf: Path) -> None:
    with pulling(str(gguf), str(gguf.parent), "hang"):
        wait_for((gguf.parent / "hanging").exists)
    assert len(leftovers(home)) > 0
    assert hub.cached_bundles() == []
    folder = hub.pull(gguf)
    assert len(exporter.sources) == 1
    open_bundle(folder)
    assert leftovers(home) == []


def test_a_waiting_process_says_so(
    exporter: FakeExporter, home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_POLL_S", 0.05)
    reports: list[tuple[str, int, int, str]] = []
    with pulling(str(gguf), str(gguf.parent), "hang") as process:
        wait_for((gguf.parent / "hanging").exists)

        def progress(*report: object) -> None:
            reports.append(report)  # type: ignore[arg-type]
            process.kill()

        folder = hub.find_bundle(gguf, progress=progress)
    assert reports[0] == (f"Waiting for another pocketlm that is making {folder.name}", 0.05, 0, "seconds")
    assert any(task.startswith("Waiting") and done == total for task, done, total, _ in reports)


def test_a_bundle_that_is_being_replaced_is_looked_at_again(
    exporter: FakeExporter, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.find_bundle(gguf)
    sound, looks = hub._sound_origin, []

    def first_fails(*arguments: object, **options: bool) -> object:
        looks.append(arguments)
        if len(looks) == 1:
            raise BundleError("half replaced")
        return sound(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "_sound_origin", first_fails)
    assert hub.find_bundle(gguf) == folder
    assert len(exporter.sources) == 1
