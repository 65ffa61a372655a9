"""The models that a server offers: which, and under which names."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_bundle import tiny_manifest, write_tiny_bundle
from pocketlm.bundle import Bundle
from pocketlm.errors import BundleError, InvalidSettingError, ModelNotFoundError
from pocketlm.manifest import Dimensions
from pocketlm.server import served_models as module
from pocketlm.server.served_models import ServedModel, served_models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache's bundles."""
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "bundles"


def named(models: list[ServedModel]) -> dict[str, tuple[str, str]]:
    return {each.name: (each.manifest.name, each.manifest.precision.name) for each in models}


def test_all_that_is_in_the_cache(cache: Path) -> None:
    for name, precision in (("one", "fp32"), ("one", "int8"), ("two", "int4"), ("two", "fp32")):
        write_tiny_bundle(cache / f"{name}-{precision}", name=name, precision=precision)
    assert named(served_models([])) == {
        "one:fp32": ("one", "fp32"),
        "one": ("one", "int8"),
        "two": ("two", "fp32"),  # the first in the order of the folders
        "two:int4": ("two", "int4"),
    }
    assert named(served_models([], "int4")) == {"two": ("two", "int4")}


def test_those_that_are_named_in_their_order(cache: Path, tmp_path: Path) -> None:
    write_tiny_bundle(cache / "one-int8", name="one")
    write_tiny_bundle(cache / "one-int4", name="one", precision="int4")
    write_tiny_bundle(tmp_path / "elsewhere", name="two")
    models = served_models([str(tmp_path / "elsewhere"), "one:int4", "one", "one-int8", "one:int8"])
    assert [model.name for model in models] == ["two", "one:int4", "one"]
    assert [model.folder.name for model in models] == ["elsewhere", "one-int4", "one-int8"]


def test_two_of_the_same_name_and_precision(cache: Path, tmp_path: Path) -> None:
    write_tiny_bundle(cache / "one-int8", name="one")
    write_tiny_bundle(cache / "hf-somebody-one-int8", name="One")
    write_tiny_bundle(tmp_path / "one-int8", name="one")
    write_tiny_bundle(tmp_path / "more" / "one-int8", name="one")
    names = ["one", "hf-somebody-one-int8", str(tmp_path / "one-int8"), str(tmp_path / "more" / "one-int8")]
    assert [model.name for model in served_models(names)] == ["one", "One:int8", "one-int8", "one:int8-2"]


@given(
    st.lists(st.tuples(st.sampled_from(["a", "A", "b", "a:int8"]), st.sampled_from(["int8", "int4", "fp32"])))
)
def test_names_are_never_shared(kinds: list[tuple[str, Any]]) -> None:
    bundles = [
        Bundle(Path(f"{name}-{precision}"), tiny_manifest(name=name, precision=precision))
        for name, precision in kinds
    ]
    names = module._names(bundles)
    assert len({name.lower() for name in names}) == len(kinds)
    for name, _ in kinds:  # each model has the plain name somewhere, but for its case
        assert name.lower() in {each.lower() for each in names}


def test_what_is_known_of_one(cache: Path) -> None:
    folder = cache / "one-int8"
    write_tiny_bundle(folder, name="one")
    os.utime(folder / "manifest.json", (1e9, 1e9))
    (model,) = served_models(["one"], context_length=32, concurrency=3, cache_bytes=1000)
    assert (model.folder, model.modified_at) == (folder, 1e9)
    assert (model.context_length, model.concurrency, model.cache_bytes) == (32, 3, 1000)
    assert model.memory.cache_bytes == 1000
    assert model.memory.slot_bytes == 4 * 2 * 1 * 1 * 4 * 32


def test_the_context_is_at_most_what_the_model_was_trained_for(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "pocketlm.server")
    write_tiny_bundle(cache / "one-int8", name="one")
    long = Dimensions(1, 8, 16, 2, 1, 4, 32, 100_000)
    write_tiny_bundle(cache / "two-int8", name="two", dimensions=long)
    assert [model.context_length for model in served_models([])] == [64, 8192]
    assert caplog.text == ""
    assert [model.context_length for model in served_models([], context_length=9000)] == [64, 9000]
    assert "one was trained for 64 tokens, so its context has as many, not 9,000" in caplog.text


@pytest.mark.parametrize("precision", [None, "int4"])
def test_an_empty_cache(cache: Path, precision: str | None) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model.* in the cache to serve. Name one") as caught:
        served_models([], precision)
    assert ("int4" in str(caught.value)) is (precision is not None)


def test_what_is_refused(cache: Path) -> None:
    write_tiny_bundle(cache / "one-int8", name="one")
    with pytest.raises(InvalidSettingError, match="context_length is 1"):
        served_models(["one"], context_length=1)
    with pytest.raises(ModelNotFoundError, match="no model 'other'"):
        served_models(["one", "other"])
    (cache / "one-int8" / "model.onnx").unlink()
    with pytest.raises(BundleError, match="missing"):
        served_models(["one"])
