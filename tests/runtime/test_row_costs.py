"""What rows cost: interpolation, its file format, and that it can be measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.bundle import open_bundle
from pocketlm.errors import InvalidSettingError
from pocketlm.row_costs import ASSUMED, RowCosts, measure
from pocketlm.session import Session

COSTS = RowCosts(rows=(1, 2, 4), depths=(0, 100), seconds=((1.0, 1.5, 2.5), (2.0, 4.0, 5.0)))

durations = st.floats(1e-6, 1e3)


@st.composite
def row_costs(draw: st.DrawFn) -> RowCosts:
    rows = sorted({1, *draw(st.lists(st.integers(1, 32), max_size=5))})
    depths = sorted(draw(st.sets(st.integers(0, 4096), min_size=1, max_size=4)))
    line = st.tuples(*[durations] * len(rows))
    return RowCosts(tuple(rows), tuple(depths), draw(st.tuples(*[line] * len(depths))))


@pytest.mark.parametrize(
    ("rows", "depth", "ratio"),
    [(1, 0, 1.0), (2, 0, 1.5), (3, 0, 2.0), (4, 0, 2.5), (8, 0, 4.5), (2, 100, 2.0), (2, 50, 2.75 / 1.5)],
)
def test_ratios_are_linear_between_what_was_measured(rows: int, depth: int, ratio: float) -> None:
    assert COSTS.ratio(rows, depth) == pytest.approx(ratio)


def test_deeper_than_measured_costs_as_the_deepest() -> None:
    assert COSTS.ratio(2, 5000) == COSTS.ratio(2, 100)


def test_less_deep_than_measured_costs_as_the_least_deep() -> None:
    costs = RowCosts((1, 2), (64, 128), ((1.0, 1.2), (1.0, 1.6)))
    assert costs.ratio(2, 0) == pytest.approx(1.2)


def test_rows_are_not_taken_for_free_where_only_one_was_measured() -> None:
    assert RowCosts((1,), (0,), ((0.5,),)).curve(3, 7) == [1.0, 2.0, 3.0]


@given(row_costs(), st.integers(1, 40), st.integers(0, 5000))
def test_more_rows_never_cost_less(costs: RowCosts, rows: int, depth: int) -> None:
    curve = costs.curve(rows, depth)
    assert curve[0] == pytest.approx(1)
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(curve))
    assert curve[-1] == costs.ratio(rows, depth)


@given(row_costs())
def test_json_gives_back_the_same(costs: RowCosts) -> None:
    assert RowCosts.from_json(costs.to_json()) == costs


def test_the_second_row_is_free_where_single_tokens_are_computed_in_pairs() -> None:
    pairs = COSTS.in_pairs()
    assert pairs.curve(4, 0) == pytest.approx([1.0, 1.0, 2 / 1.5, 2.5 / 1.5])
    single = RowCosts((1,), (0,), ((0.5,),))
    assert single.in_pairs() == single


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [1, 4, 2]}, "ascending"),
        ({"rows": [1, 2.0, 4]}, "whole numbers"),
        ({"rows": [0, 2, 4]}, "from 1 on"),
        ({"rows": [2, 3, 4]}, "begin at 2 rows"),
        ({"depths": [-1, 100]}, "from 0 on"),
        ({"depths": [0, True]}, "depths"),
        ({"depths": [0]}, "each of 1 depths"),
        ({"seconds": [[1.0, 1.5, 2.5], [2.0, 4.0]]}, "expected 3"),
        ({"seconds": [[1.0, 1.5, 2.5], [2.0, 4.0, 0]]}, "duration 0"),
        ({"seconds": [[1.0, 1.5, 2.5], [2.0, 4.0, "5"]]}, "duration '5'"),
        ({"seconds": [[1.0, 1.5, 2.5], [2.0, 4.0, float("inf")]]}, "duration inf"),
        ({"seconds": [[1.0, 1.5, 2.5], 3]}, "lists"),
        ({"rows": 1}, "lists"),
        ({"unit": "s"}, "fields"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, object], message: str) -> None:
    data = json.loads(COSTS.to_json()) | change
    with pytest.raises(InvalidSettingError, match=message):
        RowCosts.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1]", "null", '{"rows": [1]}'])
def test_what_is_no_such_file_is_refused(text: str) -> None:
    with pytest.raises(InvalidSettingError, match="Row costs"):
        RowCosts.from_json(text)


def test_the_assumed_costs_grow_with_rows() -> None:
    for depth in (0, 300, 512, 4000):
        curve = ASSUMED.curve(16, depth)
        assert curve[0] == 1
        assert curve == sorted(curve)
        assert 2.5 < curve[-1] < 16  # rows pay, and are not free


@pytest.mark.parametrize(
    ("context_length", "rows", "depths"),
    [(None, (1, 2, 3, 4, 6, 8, 12, 16), (0,)), (5, (1, 2, 3, 4), (0,))],
)
def test_measuring_stays_within_the_context(
    int8_bundle: Path, context_length: int | None, rows: tuple[int, ...], depths: tuple[int, ...]
) -> None:
    costs = measure(tiny_session(int8_bundle), context_length=context_length, budget_s=0)
    assert (costs.rows, costs.depths) == (rows, depths)


def test_measuring_looks_back_on_text(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.row_costs.DEPTHS", (0, 100, 400))
    monkeypatch.setattr("pocketlm.row_costs.ROWS", (1, 3))
    session, passes = tiny_session(int8_bundle), set()
    forward = session.forward

    def note(ids: list[int], cache: object, rows: range) -> object:
        passes.add((len(cache.ids), len(ids), len(rows), float(abs(cache.buffer[..., :100, :]).min())))  # type: ignore[attr-defined]
        return forward(ids, cache, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "forward", note)
    costs = measure(session, budget_s=0)
    assert costs.depths == (0, 100, 400)
    assert {each[:3] for each in passes} == {(depth, n, n) for depth in (0, 100, 400) for n in (1, 3)}
    assert all(each[3] > 0 for each in passes if each[0])
    assert RowCosts.from_json(costs.to_json()) == costs


def tiny_session(folder: Path) -> Session:
    bundle = open_bundle(folder, verify=False)
    manifest = bundle.manifest
    return Session(bundle.graph_path, manifest.dimensions, manifest.graph, threads=1)


def test_durations_are_a_plain_value() -> None:
    assert dataclasses.replace(COSTS) == COSTS
    assert hash(COSTS) == hash(dataclasses.replace(COSTS))
