"""What tests of the doctor share: its environment and a bundle in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.tiny_bundle import write_tiny_bundle
from pocketlm.bundle import Bundle, open_bundle

ROOT = Path(__file__).parents[2]
SETTINGS = ("POCKETLM_THREADS", "POCKETLM_TDP_W", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HOME", "HF_ENDPOINT")


def empty_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in `folder`, and an environment without settings of ours, for child processes too."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POCKETLM_HOME", str(folder / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / name) for name in ("models", "runtime")))
    return folder / "home"


def cached_bundle(home: Path, name: str = "tiny", *, size: int = 7) -> Bundle:
    """One with `size` bytes of weights, which does not run."""
    folder = home / "bundles" / f"{name}-int8"
    write_tiny_bundle(folder, name=name, weights=bytes(size))
    return open_bundle(folder, verify=False)
