"""The table of n-grams: what is written is found again, and nothing else is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_bundle import tiny_manifest, write_tiny_bundle
from pocketlm.bundle import Bundle, open_bundle
from pocketlm.errors import BundleError, InvalidSettingError
from pocketlm.ngrams import NGRAMS_NAME, NgramTable, write_table

VOCABULARY = 1 << 18
ENTRY = [("context", "<u8"), ("token", "<u4"), ("chance", "<f4")]

ids = st.integers(0, VOCABULARY - 1)
contexts = st.lists(ids, min_size=1, max_size=3).map(tuple)
chances = st.floats(0, 1, width=32)


def write(path: Path, rows: list[tuple[int, int, float]], dtype: Any = ENTRY) -> None:
    np.save(path, np.array(rows, dtype), allow_pickle=False)


@given(st.dictionaries(contexts, st.tuples(ids, chances), max_size=30), st.lists(ids, max_size=5))
def test_the_longest_context_in_the_table_decides(
    tmp_path_factory: pytest.TempPathFactory,
    entries: dict[tuple[int, ...], tuple[int, float]],
    text: list[int],
) -> None:
    path = tmp_path_factory.mktemp("table") / NGRAMS_NAME
    write_table(path, entries)
    table = NgramTable.load(path, VOCABULARY)
    assert len(table) == len(entries)
    for ids_ in (text, *map(list, entries), *([*text, *context] for context in entries)):
        known = [tuple(ids_[-n:]) for n in (3, 2, 1) if n <= len(ids_) and tuple(ids_[-n:]) in entries]
        assert table.expect(ids_) == (entries[known[0]] if known else None)


def test_a_shorter_context_is_not_taken_for_a_longer_one(tmp_path: Path) -> None:
    write_table(tmp_path / NGRAMS_NAME, {(0, 5): (1, 0.5)})
    table = NgramTable.load(tmp_path / NGRAMS_NAME, VOCABULARY)
    assert table.expect([5]) is None
    assert table.expect([0, 0, 5]) == (1, 0.5)


def test_results_are_plain_numbers(tmp_path: Path) -> None:
    write_table(tmp_path / NGRAMS_NAME, {(7,): (1, 0.5)})
    found = NgramTable.load(tmp_path / NGRAMS_NAME, VOCABULARY).expect([7])
    assert found is not None
    assert [type(each) for each in found] == [int, float]


@pytest.mark.parametrize("context", [(), (1, 2, 3, 4), (-1,), (1, (1 << 21) - 1)])
def test_a_context_that_does_not_fit_is_refused(tmp_path: Path, context: tuple[int, ...]) -> None:
    with pytest.raises(InvalidSettingError, match="does not fit the table"):
        write_table(tmp_path / NGRAMS_NAME, {context: (1, 0.5)})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(6, 1, 0.5), (5, 1, 0.5)], "ascend"),
        ([(5, 1, 0.5), (5, 1, 0.5)], "ascend"),
        ([(0, 1, 0.5)], "no ids"),
        ([(1 << 21, 1, 0.5)], "no ids"),
        ([(1 << 63 | 1, 1, 0.5)], "no ids"),
        ([(5, VOCABULARY, 0.5)], "outside the vocabulary of 262,144"),
        ([(5, 1, 1.5)], "between 0 and 1"),
        ([(5, 1, -0.5)], "between 0 and 1"),
        ([(5, 1, float("nan"))], "between 0 and 1"),
    ],
)
def test_wrong_entries_are_refused(tmp_path: Path, rows: list[tuple[int, int, float]], message: str) -> None:
    write(tmp_path / NGRAMS_NAME, rows)
    with pytest.raises(BundleError, match=message):
        NgramTable.load(tmp_path / NGRAMS_NAME, VOCABULARY)


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / NGRAMS_NAME
    for array in (np.zeros(3), np.zeros((2, 2), ENTRY), np.zeros(2, [*ENTRY, ("more", "<u4")])):
        np.save(path, array)
        with pytest.raises(BundleError, match=r"a list of .* is expected"):
            NgramTable.load(path, VOCABULARY)
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(BundleError, match="is not a table of n-grams"):
        NgramTable.load(path, VOCABULARY)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x04\x00{'a'", b"PK\x03\x04"]
)
def test_what_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NGRAMS_NAME).write_bytes(content)
    with pytest.raises(BundleError, match="is not a table of n-grams"):
        NgramTable.load(tmp_path / NGRAMS_NAME, VOCABULARY)


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NGRAMS_NAME
    write_table(path, {(7,): (1, 0.5), (8,): (1, 0.5)})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BundleError, match="is not a table of n-grams"):
        NgramTable.load(path, VOCABULARY)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / NGRAMS_NAME, np.array([print], object), allow_pickle=True)
    with pytest.raises(BundleError, match="is not a table of n-grams"):
        NgramTable.load(tmp_path / NGRAMS_NAME, VOCABULARY)


def test_a_bundle_has_the_table_that_its_manifest_lists(tmp_path: Path) -> None:
    tmp_path = tmp_path / "bundle"
    tmp_path.mkdir()
    write_table(tmp_path / NGRAMS_NAME, {(7,): (1, 0.5)})
    write_tiny_bundle(tmp_path)
    bundle = open_bundle(tmp_path)
    assert bundle.ngrams is not None
    assert bundle.ngrams.expect([7]) == (1, 0.5)
    assert Bundle(tmp_path, tiny_manifest()).ngrams is None


def test_a_bundle_refuses_a_table_for_another_vocabulary(tmp_path: Path) -> None:
    vocabulary = tiny_manifest().dimensions.vocabulary
    tmp_path = tmp_path / "bundle"
    tmp_path.mkdir()
    write_table(tmp_path / NGRAMS_NAME, {(7,): (vocabulary, 0.5)})
    write_tiny_bundle(tmp_path)
    with pytest.raises(BundleError, match="outside the vocabulary"):
        open_bundle(tmp_path).ngrams  # noqa: B018
