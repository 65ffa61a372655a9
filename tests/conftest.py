"""Bundles of a tiny random model, exported once for all tests that run one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pocketlm.engine import Model
    from pocketlm.sources import SourceFiles


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> SourceFiles:
    """A checkpoint folder; not to be written to."""
    from helpers.tiny import tiny_checkpoint, write_folder

    return write_folder(tmp_path_factory.mktemp("source") / "checkpoint", tiny_checkpoint())


@pytest.fixture(scope="session")
def fp32_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    from helpers.tiny import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("bundle"), "fp32")


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    from helpers.tiny import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("bundle"), "int8")


@pytest.fixture
def model(int8_bundle: Path) -> Iterator[Model]:
    """The int8 bundle, newly loaded: nothing is in its caches."""
    import pocketlm

    with pocketlm.load(int8_bundle, threads=1) as model:
        yield model
