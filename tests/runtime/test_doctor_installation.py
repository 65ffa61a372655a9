"""What the doctor finds of installations, caches and settings that are made up."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.doctor import cached_bundle, empty_home
from pocketlm.doctor import installation, privacy


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


METADATA = (
    "onnxruntime>=1.25",
    "numpy>=1.26",
    "tomli>=1; python_version < '3'",
    'onnx>=1.18; extra == "export"',
    'pocketlm[export]; extra == "bench"',
    'psutil>=6; extra == "bench"',
    'zeus>=1; sys_platform == "nowhere" and extra == "bench"',
    'fastapi>=0.110; extra == "serve"',
    'pytest>=8; extra == "test"',
)


class Packages:
    """Stands in for the environment's metadata."""

    def __init__(self, **versions: str) -> None:
        self.versions = versions

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.versions[name]

    def requires(self, name: str) -> list[str]:
        self.version(name)
        return list(METADATA)

    def metadata(self, name: str) -> Message:
        self.version(name)
        message = Message()
        for extra in ("export", "bench", "serve", "test", "all"):
            message["Provides-Extra"] = extra
        return message


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(**versions: str) -> None:
        fake = Packages(**versions)
        for name in ("version", "requires", "metadata"):
            monkeypatch.setattr(importlib.metadata, name, getattr(fake, name))

    return pretend


def test_versions(packages: Callable[..., None]) -> None:
    packages(pocketlm="0.1.0", onnxruntime="1.31.1", numpy="2.4.6")
    (check,) = installation.versions()
    assert (
        check.text == f"python {platform.python_version()}, pocketlm 0.1.0, onnxruntime 1.31.1, numpy 2.4.6"
    )
    assert check.facts["versions"]["tokenizers"] is None


def test_packages_that_are_missing_or_too_old(packages: Callable[..., None]) -> None:
    packages(pocketlm="0.1.0", onnxruntime="1.20.0")
    _, old, missing = installation.versions()
    assert (old.name, old.state) == ("onnxruntime", "problem")
    assert old.text == "1.20.0 is installed; pocketlm needs >=1.25"
    assert old.remedy == 'pip install --upgrade "onnxruntime>=1.25"'
    assert (missing.name, missing.text) == ("numpy", "not installed; pocketlm needs numpy>=1.26")


def test_extras(packages: Callable[..., None]) -> None:
    packages(pocketlm="0.1.0", onnx="1.18.0")
    extras, bench, serve = installation.extras()
    assert (extras.text, extras.state) == ("installed: export", "ok")
    assert extras.facts == {"installed": ["export"], "missing": {"bench": ["psutil"], "serve": ["fastapi"]}}
    assert (bench.state, bench.text) == ("absent", "not installed: it lacks psutil")
    assert (serve.name, serve.remedy) == ("serve", 'pip install "pocketlm[serve]"')


def test_an_extra_within_an_extra(packages: Callable[..., None]) -> None:
    packages(pocketlm="0.1.0", psutil="7.0")
    missing = next(iter(installation.extras())).facts["missing"]
    assert missing["bench"] == ["onnx"]


def test_a_source_folder(packages: Callable[..., None]) -> None:
    packages(onnxruntime="1.31.1")
    (check,) = installation.extras()
    assert (check.state, "source folder" in check.text) == ("note", True)
    assert len(list(installation.versions())) == 1


# Cache


class TestCache:
    @pytest.fixture(autouse=True)
    def disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free(monkeypatch, 50_000_000_000)

    def free(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    def test_none_yet(self, home: Path) -> None:
        (check,) = installation.folder()
        assert (check.state, check.text) == ("ok", f"{home} holds 0 B; its disk has 50.0 GB left")
        (models,) = installation.models()
        assert (models.state, models.remedy) == ("absent", "pocketlm pull smollm2-135m")
        assert not home.exists()

    def test_what_is_here(self, home: Path) -> None:
        cached_bundle(home, size=3_000_000)
        (home / "link").symlink_to(home / "bundles")
        (folder,) = installation.folder()
        assert 3_000_000 < folder.facts["used_bytes"] < 3_010_000
        (models,) = installation.models()
        assert (models.state, models.text) == ("ok", "tiny int8")
        assert [each["name"] for each in models.facts["models"]] == ["tiny"]

    def test_a_damaged_bundle(self, home: Path) -> None:
        cached_bundle(home)
        damaged = cached_bundle(home, "broken")
        (damaged.folder / "model.onnx.data").write_bytes(b"short")
        (home / "bundles" / ".tiny.0123.partial").mkdir()
        models, broken = installation.models()
        assert models.text == "tiny int8"
        assert (broken.name, broken.state) == ("broken-int8", "problem")
        assert "model.onnx.data has 5 bytes" in broken.text

    def test_a_disk_that_is_almost_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free(monkeypatch, 1_000_000_000)
        (check,) = installation.folder()
        assert (check.state, check.facts["free_bytes"]) == ("note", 1_000_000_000)
        assert check.remedy is not None

    def test_a_folder_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        (check,) = installation.folder()
        assert (check.state, "not writable" in check.text) == ("problem", True)
        assert "POCKETLM_HOME" in (check.remedy or "")

    def test_a_file_that_goes_meanwhile(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "walk", lambda path: [(str(home), [], ["gone"])])
        assert next(installation.folder()).facts["used_bytes"] == 0


# Privacy


def test_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    import pocketlm.session  # noqa: F401  (sets it once)

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    assert next(privacy.telemetry()).state == "ok"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    check = next(privacy.telemetry())
    assert (check.state, "'0', 1 is expected" in check.text) == ("problem", True)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "asked only for models that are not here" in next(privacy.hub()).text
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:password@mirror.example/hf")
    check = next(privacy.hub())
    assert check.text == (
        "HF_HUB_OFFLINE is set: nothing is fetched from the Hugging Face Hub; a token is set; "
        "HF_ENDPOINT is https://mirror.example/hf"
    )
    assert "secret" not in json.dumps(dict(check.facts))
    assert "password" not in json.dumps(dict(check.facts))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({}, "none: downloads go straight to their servers"),
        ({"no": "localhost"}, "none: downloads go straight to their servers"),
        ({"https": "http://me:pass@proxy:3128"}, "downloads of https through http://proxy:3128"),
        (
            {"http": "proxy:80", "no": "localhost"},
            "downloads of http through proxy:80, but for localhost",
        ),
    ],
)
def test_proxies(found: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", lambda: found)
    check = next(privacy.proxies())
    assert check.text == text
    assert "pass" not in json.dumps(dict(check.facts))
