from __future__ import annotations

import itertools

import numpy as np
import pytest

from pocketlm_benchmarks.sampler_cost import CASES, cost_us, main, measure, rows_like_a_models


def test_rows_resemble_a_models() -> None:
    rows = rows_like_a_models(4, 20_000)
    assert rows.shape == (4, 20_000)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, rows_like_a_models(4, 20_000))
    probabilities = np.sort(np.exp(rows - rows.max(axis=1, keepdims=True)).astype(np.float64), axis=1)[
        :, ::-1
    ]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert np.all(probabilities[:, :100].sum(axis=1) > 0.9)
    assert np.all(probabilities[:, 1:100].sum(axis=1) > 0.01)


def test_a_cost_is_the_median_of_each_rows_fastest() -> None:
    # Seconds that the choices of two rows take, repetition by repetition.
    taken = [3.0, 9.0, 1.0, 5.0, 2.0, 7.0]
    readings = itertools.accumulate(itertools.chain.from_iterable((0.0, each) for each in taken))
    logits = np.zeros((2, 10), dtype=np.float32)
    assert cost_us(CASES[0], logits, 3, lambda: next(readings)) == pytest.approx((1.0 + 5.0) / 2 * 1e6)


def test_every_case_is_measured_with_every_vocabulary() -> None:
    figures = measure([100, 70], rows=1, repetitions=1)
    assert list(figures) == [case.name for case in CASES]
    assert all(len(costs) == 2 and min(costs) > 0 for costs in figures.values())


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--vocabulary", "1000", "--rows", "2", "--repetitions", "1"])
    printed = capsys.readouterr().out
    assert "1,000 tokens" in printed
    assert all(case.name.split(",")[0] in printed for case in CASES)


@pytest.mark.parametrize("option", ["--vocabulary", "--rows", "--repetitions"])
def test_refuses_none(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, "0"])
    assert f"{option} is 0, expected 1 or more" in capsys.readouterr().err
