"""Weights of the Hugging Face Hub, from a server on 127.0.0.1."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from helpers.fake_hub import CHECKPOINT, REPOSITORY, FakeHub, fake_hub
from helpers.processes import ROOT
from helpers.tiny_bundle import FakeExporter
from pocketlm import hub, huggingface
from pocketlm.bundle import open_bundle
from pocketlm.cache import read_origin
from pocketlm.errors import DownloadError, ModelNotFoundError, StorageError, UnsupportedModelError
from pocketlm.huggingface import HubRequest, parse_hub_name
from pocketlm_models import CatalogueEntry, HubSource

NAME = f"hf:{REPOSITORY}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    # huggingface_hub reads its environment when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # version 0 keeps a copy of its own
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield server


@pytest.fixture
def exporter(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeExporter:
    fake = FakeExporter()
    monkeypatch.setattr(hub, "_exporter", lambda: fake)
    return fake


def test_names() -> None:
    assert parse_hub_name("hf:Org/Re.po-1_x") == HubRequest("Org/Re.po-1_x")
    assert parse_hub_name("hf:o/r@refs/pr/1") == HubRequest("o/r", "refs/pr/1")
    assert parse_hub_name("hf:o/r@v1:Q4/My File.gguf") == HubRequest("o/r", "v1", "Q4/My File.gguf")
    for text in ("hf:o/r", "hf:o/r@v1", "hf:o/r:x.gguf", "hf:o/r@v1:x.gguf"):
        assert parse_hub_name(text).asked == text
    assert parse_hub_name("hf:o/Big Model".replace(" ", "-")).name == "big-model"
    assert parse_hub_name("hf:o/r:Q4/My File.gguf").name == "my-file"
    assert parse_hub_name("hf:o/r@" + "0" * 40).pinned
    assert not parse_hub_name("hf:o/r@v1").pinned


def test_different_requests_have_different_bundles() -> None:
    texts = ["hf:o/r", "hf:p/r", "hf:o/r@v1", "hf:o/r:r.gguf", "hf:o/r:q/r.gguf"]
    assert len({parse_hub_name(text).folder for text in texts}) == len(texts)
    assert parse_hub_name("hf:o/r").folder == parse_hub_name("hf:o/r@main").folder


def test_fetch_a_checkpoint(server: FakeHub) -> None:
    reports: list[tuple[str, int, int, str]] = []
    source = hub.fetch_source(NAME, progress=lambda *report: reports.append(report))
    assert source.path.name == source.revision == server.commit
    assert (source.name, source.location, source.licence) == ("tiny-model", NAME, "mit")
    assert (source.path / "model.safetensors").read_bytes() == CHECKPOINT["model.safetensors"]
    assert server.served() == {"config.json", "tokenizer.json", "model.safetensors"}
    total = sum(len(CHECKPOINT[name]) for name in server.served())
    assert ("Downloading tiny-model", total, total, "B") in reports
    server.requests.clear()
    assert hub.fetch_source(NAME) == source
    assert server.served() == set()


def test_privacy(server: FakeHub) -> None:
    hub.fetch_source(NAME)
    assert all(
        path.split(" ")[1].startswith((f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/"))
        for path in server.requests
    )
    agents = " ".join(server.user_agents)
    assert "torch" not in agents
    assert "agent/" not in agents


def test_progress_bars_are_the_user_s_again_afterwards(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    hub.fetch_source(NAME)
    assert not are_progress_bars_disabled()
    assert "it/s" not in capfd.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    hub.fetch_source(NAME)  # the environment decides: nothing is touched, and nothing warns


def test_sharded_weights_and_their_index(server: FakeHub) -> None:
    server.files["model.safetensors.index.json"] = b"index"
    server.files["model-00001-of-00002.safetensors"] = b"1"
    server.files["model-00002-of-00002.safetensors"] = b"2"
    hub.fetch_source(NAME)
    assert server.served() == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_weights_of_an_unusual_name(server: FakeHub) -> None:
    del server.files["model.safetensors"]
    assert hub.fetch_source(NAME).path.is_dir()
    assert "consolidated.safetensors" in server.served()


def test_one_gguf_file(server: FakeHub) -> None:
    server.files = {"q/Tiny.gguf": b"GGUF", "Tiny.F16.gguf": b"GGUF"}
    source = hub.fetch_source(f"{NAME}:q/Tiny.gguf")
    assert source.path.read_bytes() == b"GGUF"
    assert (source.name, source.revision, source.location) == ("tiny", server.commit, f"{NAME}:q/Tiny.gguf")
    with pytest.raises(
        ModelNotFoundError, match=r"has no file b\.gguf\. It has Tiny\.F16\.gguf, q/Tiny\.gguf\."
    ):
        hub.fetch_source(f"{NAME}:b.gguf")
    with pytest.raises(
        UnsupportedModelError, match=rf"GGUF files only\. Name one: {NAME}:Tiny\.F16\.gguf, {NAME}:q"
    ):
        hub.fetch_source(NAME)


def test_a_repository_without_weights(server: FakeHub) -> None:
    server.files = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b""}
    with pytest.raises(
        UnsupportedModelError, match=rf"{NAME} has no \*\.safetensors; it holds config\.json, pytorch_"
    ):
        hub.fetch_source(NAME)
    assert server.served() == set()


def test_a_branch_that_moves(exporter: FakeExporter, server: FakeHub) -> None:
    folder = hub.find_bundle(NAME)
    origin = read_origin(folder)
    assert origin is not None
    assert (origin.asked, origin.revision) == (NAME, "a" * 40)
    server.commit = "b" * 40
    server.files["model.safetensors"] = b"newer"
    server.requests.clear()
    assert hub.find_bundle(NAME) == hub.find_bundle("tiny-model") == folder
    assert server.requests == []  # what is cached runs without the network
    assert hub.pull(NAME) == folder
    assert (folder / "model.onnx.data").read_bytes() == b"newer"
    assert open_bundle(folder).manifest.source.revision == "b" * 40
    assert hub.pull("tiny-model") == hub.pull(folder.name) == folder
    assert len(exporter.sources) == 2


def test_a_pinned_commit_is_not_looked_up_again(exporter: FakeExporter, server: FakeHub) -> None:
    name = f"{NAME}@{server.commit}"
    folder = hub.pull(name)
    server.requests.clear()
    assert hub.pull(name) == folder
    assert server.requests == []
    assert hub.remove(name) == [folder]


def test_a_hub_model_of_the_catalogue(
    exporter: FakeExporter, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CatalogueEntry("known", "", "MIT", "fp32", HubSource(REPOSITORY))
    monkeypatch.setattr(hub, "catalogue", lambda: {"known": entry})
    folder = hub.find_bundle("known")
    assert folder.name == "known-fp32"
    assert (exporter.sources[0].name, exporter.sources[0].licence) == ("known", "MIT")
    assert hub.find_bundle("known") == folder
    assert hub.remove("known", source=True) == [folder]


def test_offline_with_everything_here(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["q/Tiny.gguf"] = b"GGUF"
    source, gguf = hub.fetch_source(NAME), hub.fetch_source(f"{NAME}:q/Tiny.gguf")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    offline = hub.fetch_source(NAME)
    assert (offline.path, offline.revision) == (source.path, source.revision)
    assert hub.fetch_source(f"{NAME}:q/Tiny.gguf").path == gguf.path
    assert server.requests == []
    (source.path / "model.safetensors").unlink()
    (source.path / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"no \*\.safetensors and no tokenizer\.json"):
        hub.fetch_source(NAME)


def test_offline_with_nothing_here(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DownloadError, match=r"not in the cache of the Hugging Face Hub, and HF_HUB_OFFLINE forbids"
    ):
        hub.fetch_source(NAME)
    assert server.requests == []


@pytest.mark.parametrize(
    ("kind", "status", "code", "error", "message"),
    [
        (
            "api",
            404,
            "RepoNotFound",
            ModelNotFoundError,
            rf"no repository {REPOSITORY} that you may read.*HF_TOKEN",
        ),
        ("api", 401, "RepoNotFound", ModelNotFoundError, "that you may read"),
        ("api", 401, "", DownloadError, r"the Hub refuses access \(401\)"),
        ("api", 404, "RevisionNotFound", ModelNotFoundError, "has no revision v9"),
        (
            "api",
            403,
            "GatedRepo",
            DownloadError,
            rf"is gated\. Accept its terms at http.*/{REPOSITORY}.*HF_TOKEN",
        ),
        ("resolve", 403, "GatedRepo", DownloadError, "is gated"),
        ("api", 403, "", DownloadError, r"the Hub refuses access \(403\)\. HF_TOKEN is wrong, expired"),
        ("api", 418, "", DownloadError, r"the Hub answered with status 418"),
    ],
)
def test_refusals(
    server: FakeHub, kind: str, status: int, code: str, error: type[Exception], message: str
) -> None:
    server.refuse[kind] = (status, code)
    with pytest.raises(error, match=message):
        hub.fetch_source(f"{NAME}@v9")


def test_no_network(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DownloadError, match=r"http://127\.0\.0\.1:9 cannot be reached\. Check the network, the proxy"
    ):
        hub.fetch_source(NAME)


def test_a_hub_without_commits(server: FakeHub) -> None:
    server.commit = ""
    with pytest.raises(DownloadError, match=r"names no commit for it \(''\)"):
        hub.fetch_source(NAME)


def test_a_file_that_is_not_what_the_hub_announces(server: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    server.announced_sha256 = "0" * 64
    with pytest.raises(
        DownloadError, match=r"model\.safetensors of .* has the sha256 .*, expected 0{64}, twice"
    ):
        hub.fetch_source(NAME)
    assert "downloading it again" in caplog.text


def test_a_damaged_file_in_the_hub_s_cache(server: FakeHub) -> None:
    path = hub.fetch_source(NAME).path / "model.safetensors"
    for damaged in (b"", CHECKPOINT["model.safetensors"][:-1] + b"x"):
        path.resolve().write_bytes(damaged)
        server.requests.clear()
        hub.fetch_source(NAME)
        assert path.read_bytes() == CHECKPOINT["model.safetensors"]
        assert server.served() == {"model.safetensors"}


def test_a_full_disk(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(StorageError, match=r"the disk is full.*HF_HOME moves the cache"):
        hub.fetch_source(NAME)


def test_progress_while_a_file_grows(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface, "_POLL_S", 0.01)
    download = huggingface_hub.hf_hub_download
    blobs = tmp_path / "hf" / f"models--{REPOSITORY.replace('/', '--')}" / "blobs"
    seen: set[int] = set()

    def slow(repository: str, name: str, **options: object) -> str:
        if name == "model.safetensors" and 4008 not in seen:
            (blobs / "x.incomplete").write_bytes(b"x" * 4003)
            while not seen & {4008}:
                time.sleep(0.01)
        return download(repository, name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", slow)
    small = len(CHECKPOINT["config.json"]) + len(CHECKPOINT["tokenizer.json"])
    assert small == 5
    hub.fetch_source(NAME, progress=lambda task, done, total, unit: seen.add(done))
    assert 4008 in seen


def test_the_environment_that_everybody_knows(server: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN in a process that has not imported anything yet."""
    code = (
        "import json, sys; from pocketlm.hub import fetch_source; "
        f"print(json.dumps([str(fetch_source('{NAME}').path), "
        "'huggingface_hub' in sys.modules, 'onnx' in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT / "models"), str(ROOT / "runtime")]),
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "elsewhere"),
            "HF_TOKEN": "hf_secret",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    path, with_hub, with_onnx = json.loads(result.stdout)
    assert Path(path).is_relative_to(tmp_path / "elsewhere" / "hub")
    assert (with_hub, with_onnx) == (True, False)
    assert server.authorizations == {"Bearer hf_secret"}
    assert result.stderr == ""
