"""Measuring what is best for a bundle here, and keeping it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_bundle import tiny_manifest
from helpers.tunings import a_tuning
from pocketlm import tuning as module
from pocketlm.bundle import Bundle, open_bundle
from pocketlm.manifest import FileEntry, Manifest
from pocketlm.row_costs import RowCosts
from pocketlm.session import Session
from pocketlm.tuning import (
    CHUNKS,
    CLEARLY,
    ChunkTrial,
    Device,
    ThreadTrial,
    Tuning,
    best_chunk,
    fastest_threads,
    find_tuning,
    save,
    thriftiest_threads,
    tune,
    tuning_path,
)

TWO_CORES = Device("Test Processor 9000", cores=2, hardware_threads=2)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, empty, on a device with two cores."""
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "this_device", lambda: TWO_CORES)
    return tmp_path / "home"


@pytest.fixture
def manifest() -> Manifest:
    return manifest_of("1" * 64)


def manifest_of(graph_sha256: str) -> Manifest:
    return tiny_manifest(files={"model.onnx": FileEntry(1, graph_sha256)})


def tuning_of(manifest: Manifest) -> Tuning:
    graph_sha256, device, version = module._identity(manifest)
    return dataclasses.replace(a_tuning(), graph_sha256=graph_sha256, device=device, onnxruntime=version)


def thread_trial(threads: int, request_s: float, cpu_s: float = 1.0, *, spin_us: int = 0) -> ThreadTrial:
    """A trial whose request takes that long."""
    trial = ThreadTrial(threads, spin_us, 0.0, request_s / 128, 0.0, cpu_s / 128)
    assert trial.request_s == pytest.approx(request_s)
    assert trial.request_cpu_s == pytest.approx(cpu_s)
    return trial


# keeping


def test_what_is_saved_is_found(manifest: Manifest, here: Path) -> None:
    assert find_tuning(manifest) is None
    path = save(tuning_of(manifest), manifest)
    assert path == tuning_path(manifest)
    assert path.parent == here / "tuning"
    assert find_tuning(manifest) == tuning_of(manifest)
    later = dataclasses.replace(tuning_of(manifest), threads=1)
    save(later, manifest)
    assert find_tuning(manifest) == later
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_it_holds_for_one_graph_device_and_release(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tuning_of(manifest), manifest)
    assert find_tuning(manifest_of("2" * 64)) is None
    for device in (
        dataclasses.replace(TWO_CORES, processor="Another"),
        dataclasses.replace(TWO_CORES, cores=4),
        dataclasses.replace(TWO_CORES, hardware_threads=4),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, "this_device", lambda device=device: device)
            assert find_tuning(manifest) is None
    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime.__version__", "99.0")
        assert find_tuning(manifest) is None
    assert find_tuning(manifest) is not None


def test_a_file_of_another_device_in_its_place_is_not_believed(manifest: Manifest) -> None:
    save(dataclasses.replace(tuning_of(manifest), device=Device("Another", 2, 2)), manifest)
    assert find_tuning(manifest) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\ud800", "[" * 100_000])
def test_a_file_that_is_no_tuning_is_as_none(text: str, manifest: Manifest) -> None:
    path = save(tuning_of(manifest), manifest)
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert find_tuning(manifest) is None


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 0},
        {"eco_threads": -1},
        {"prefill_chunk": 0},
        {"threads": "2"},
        {"threads": True},
        {"surplus": 1},
        {"row_costs": {"rows": [2], "depths": [0], "seconds": [[1.0]]}},
        {"row_costs": None},
        {"device": "here"},
        {"thread_trials": [{}]},
    ],
)
def test_a_damaged_file_is_as_none(change: dict[str, Any], manifest: Manifest) -> None:
    path = save(tuning_of(manifest), manifest)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert find_tuning(manifest) is None


def test_row_costs_go_by_threads() -> None:
    tuning = a_tuning()
    assert tuning.costs_with(2) is tuning.row_costs
    assert tuning.costs_with(1) is tuning.eco_row_costs
    assert tuning.costs_with(3) is None


# choosing


def test_more_threads_have_to_be_clearly_faster() -> None:
    assert fastest_threads([thread_trial(1, 1.0), thread_trial(2, 0.97), thread_trial(4, 0.96)]) == 1
    assert fastest_threads([thread_trial(1, 1.0), thread_trial(2, 0.6), thread_trial(4, 0.58)]) == 2
    assert fastest_threads([thread_trial(4, 1.0), thread_trial(8, 1.3)]) == 4
    # Spinning or not: the better one speaks for its number of threads.
    assert (
        fastest_threads([thread_trial(1, 1.0), thread_trial(2, 1.1), thread_trial(2, 0.7, spin_us=50)]) == 2
    )


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 100.0)), min_size=1))
def test_the_fewest_threads_that_are_as_good_as_fastest(figures: list[tuple[int, float]]) -> None:
    trials = [ThreadTrial(threads, 0, request_s / 256, 0.0, 0.0, 0.0) for threads, request_s in figures]
    chosen = fastest_threads(trials)
    best_s = min(trial.request_s for trial in trials)
    good = [trial for trial in trials if trial.request_s * CLEARLY <= best_s]
    assert chosen in [trial.threads for trial in good]
    assert all(trial.threads >= chosen for trial in good)


def test_eco_saves_processor_time_but_is_not_slow_beyond_measure() -> None:
    one, two, four = thread_trial(1, 4.0, 4.0), thread_trial(2, 2.2, 4.4), thread_trial(4, 1.4, 5.6)
    assert thriftiest_threads([one, two, four]) == 2
    assert thriftiest_threads([one, two]) == 1
    assert thriftiest_threads([thread_trial(2, 1.0, 2.0), thread_trial(1, 1.5, 2.0)]) == 1
    # Eco does not spin, so what is faster and cheaper with spinning says nothing about it.
    assert thriftiest_threads([one, two, thread_trial(4, 0.1, 0.1, spin_us=50)]) == 1


def test_another_chunk_has_to_be_clearly_faster() -> None:
    assert best_chunk([ChunkTrial(64, 0.97), ChunkTrial(128, 1.0), ChunkTrial(256, 1.1)]) == 128
    assert best_chunk([ChunkTrial(64, 0.9), ChunkTrial(128, 1.0), ChunkTrial(256, 1.1)]) == 64
    assert best_chunk([ChunkTrial(32, 1.0), ChunkTrial(64, 0.99)]) == 64


@pytest.mark.parametrize(
    ("cores", "hardware_threads", "counts"),
    [(1, 1, [1]), (1, 2, [1, 2]), (2, 2, [1, 2]), (6, 12, [1, 2, 4, 6, 12]), (8, 8, [1, 2, 4, 8])],
)
def test_which_threads_are_tried(cores: int, hardware_threads: int, counts: list[int]) -> None:
    settings = list(module._thread_settings(Device("x", cores, hardware_threads)))
    assert [threads for threads, spin_us in settings if spin_us == 0] == counts
    assert [threads for threads, spin_us in settings if spin_us] == [each for each in counts if each > 1]


# measuring


@pytest.fixture
def bundle(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A tiny one, measured as briefly as can be."""
    monkeypatch.setattr(module, "_BUDGET_S", 0.0)
    monkeypatch.setattr(module, "_LEAST_ROUNDS", 1)
    return open_bundle(int8_bundle, verify=False)


def test_tune_measures_and_keeps_nothing_by_itself(bundle: Bundle, here: Path) -> None:
    seen: list[tuple[str, int, int, str]] = []
    tuning = tune(bundle, progress=lambda *report: seen.append(report))
    assert {trial.threads for trial in tuning.thread_trials} == {1, 2}
    assert min(min(dataclasses.astuple(trial)[2:]) for trial in tuning.thread_trials) > 0
    assert [trial.chunk for trial in tuning.chunk_trials] == list(CHUNKS)
    assert tuning.threads == fastest_threads(tuning.thread_trials)
    assert tuning.eco_threads == thriftiest_threads(tuning.thread_trials)
    assert tuning.prefill_chunk == best_chunk(tuning.chunk_trials)
    assert 0 < tuning.core_share <= 1
    assert tuning.device == TWO_CORES
    assert {report[0] for report in seen} == {f"Tuning {bundle.manifest.name}"}
    assert [report[1] for report in seen] == list(range(seen[0][2] + 1))
    assert not here.exists()
    save(tuning, bundle.manifest)
    assert find_tuning(bundle.manifest) == tuning


@pytest.mark.parametrize("capacity", [2, 24])
def test_a_short_context(bundle: Bundle, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = RowCosts((1,), (0,), ((1.0,),))
    monkeypatch.setattr(module, "measure", lambda session, *, context_length: costs)
    tuning = tune(bundle, context_length=capacity)
    assert [trial.chunk for trial in tuning.chunk_trials] == [capacity]
    assert tuning.prefill_chunk == capacity


def test_row_costs_are_measured_for_eco_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(session: Session, *, context_length: int) -> RowCosts:
        return RowCosts((1,), (0,), ((float(session.threads),),))

    monkeypatch.setattr(module, "measure", costs)
    monkeypatch.setattr(module, "fastest_threads", lambda trials: 2)
    monkeypatch.setattr(module, "thriftiest_threads", lambda trials: 1)
    tuning = tune(bundle)
    assert (tuning.row_costs.seconds, tuning.eco_row_costs.seconds) == (((2.0,),), ((1.0,),))
    monkeypatch.setattr(module, "thriftiest_threads", lambda trials: 2)
    tuning = tune(bundle)
    assert tuning.row_costs is tuning.eco_row_costs


def test_an_interrupt_leaves_nothing(bundle: Bundle, here: Path) -> None:
    def interrupt(task: str, done: int, total: int, unit: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(bundle, progress=interrupt)
    assert not here.exists()


def test_a_disturbed_device_shows() -> None:
    assert not a_tuning().disturbed
    assert dataclasses.replace(a_tuning(), core_share=0.5).disturbed


def test_threads_spinning_and_chunks_do_not_change_a_bit(bundle: Bundle) -> None:
    ids = np.random.default_rng(0).integers(0, 250, 96).tolist()
    found = []
    for threads, spin_us, chunk in ((1, 0, 96), (2, 0, 32), (2, 50, 48), (2, None, 24)):
        manifest = bundle.manifest
        session = Session(
            bundle.graph_path, manifest.dimensions, manifest.graph, threads=threads, spin_us=spin_us
        )
        cache = session.new_cache(128)
        for start in range(0, len(ids), chunk):
            logits = session.forward(ids[start : start + chunk], cache)
        prefilled = logits[0].copy()
        found.append((prefilled.tobytes(), session.forward([1], cache)[0].tobytes()))
    assert len(set(found)) == 1
