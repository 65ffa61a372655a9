"""Sizes and durations as people write them."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import InvalidSettingError
from pocketlm.quantities import parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("0", 0), ("7", 7), ("7B", 7), ("8MB", 8_000_000), ("8m", 8_000_000), ("1.5kb", 1500)),
        *(("2GiB", 2 << 30), ("2 gi", 2 << 30), (" 1TiB ", 1 << 40), ("0.5KiB", 512), ("3TB", 3 * 10**12)),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "-1", "1e3", "8 apples", "8MBB", "1,5 GB", "8iB", "nan", "0x10", "٣", "9" * 50]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidSettingError, match="is no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0", 0), ("90", 90), ("1.5", 1.5), ("10m", 600), ("1h30m", 5400), ("500ms", 0.5), ("2D", 172_800)),
        *(("-1", -1), ("-2m", -120), ("1h1s", 3601), (" 5s ", 5)),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-", "m", "10x", "1h 30m", "1m30", "--1", "inf", "nan", "1e3", "٣s", "9" * 50]
)
def test_no_durations(text: str) -> None:
    with pytest.raises(InvalidSettingError, match="is no duration"):
        parse_seconds(text)


@given(st.text(max_size=50))
def test_any_text_is_a_finite_number_or_refused(text: str) -> None:
    for parse in (parse_bytes, parse_seconds):
        with contextlib.suppress(InvalidSettingError):
            assert math.isfinite(parse(text))
