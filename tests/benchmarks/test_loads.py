"""Cold and warm loads, and files that leave the page cache."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.scripted import INFO, ScriptedEngine
from pocketlm_benchmarks import loads
from pocketlm_benchmarks.engines.protocol import EngineSpec
from pocketlm_benchmarks.loads import drop_from_page_cache, load


def start(spec: EngineSpec) -> ScriptedEngine:
    return ScriptedEngine(spec)


@pytest.mark.parametrize(("cold", "starts"), [(True, 4), (False, 3)])
def test_one_cold_load_and_the_warm_ones(monkeypatch: pytest.MonkeyPatch, cold: bool, starts: int) -> None:
    monkeypatch.setattr(loads, "drop_from_page_cache", lambda path: cold)
    started: list[ScriptedEngine] = []

    def start(spec: EngineSpec) -> ScriptedEngine:
        started.append(ScriptedEngine(spec))
        return started[-1]

    engine, times = load(EngineSpec("x", "weights", 1, 8), start, warm=3)
    assert len(started) == starts
    assert [each.closed for each in started] == [True] * (starts - 1) + [False]
    assert engine is started[-1]
    assert times.cold_s == (INFO.load_s if cold else None)
    assert times.warm_s is not None
    assert times.warm_s.n == 3


def test_an_engine_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "drop_from_page_cache", lambda path: False)
    silent = replace(INFO, load_s=None)
    _, times = load(EngineSpec("x", "weights", 1, 8), lambda spec: ScriptedEngine(spec, info=silent), warm=2)
    assert times.warm_s is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whether a page is cached")
def test_a_file_that_was_dropped_is_read_from_the_disk(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a", "folder/b"):
        (tmp_path / name).write_bytes(os.urandom(20_000))
    assert loads._is_cached(tmp_path / "a")
    if not drop_from_page_cache(tmp_path):
        pytest.skip("a file system in memory keeps its pages")
    (tmp_path / "a").read_bytes()
    assert loads._is_cached(tmp_path / "a")


def test_what_is_no_file_cannot_be_dropped(tmp_path: Path) -> None:
    assert not drop_from_page_cache(tmp_path / "nothing")
    assert not drop_from_page_cache(Path("http://127.0.0.1:1/v1"))
    assert not drop_from_page_cache(tmp_path)


def test_a_system_that_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert not drop_from_page_cache(tmp_path)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux")
def test_a_file_system_that_cannot_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")

    def refuse(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", refuse)
    assert not drop_from_page_cache(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only there files are dropped at all")
def test_a_file_that_cannot_be_dropped_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(22, "Invalid argument")  # as some network file systems do

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", refuse)
    assert not drop_from_page_cache(tmp_path / "a")
