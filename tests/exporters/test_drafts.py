"""The table of n-grams of a bundle, from what its model says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers.tiny import tiny_checkpoint, write_folder
from pocketlm.bundle import open_bundle
from pocketlm.cli import build_app
from pocketlm.errors import InvalidSettingError
from pocketlm.manifest import read_manifest
from pocketlm.ngrams import NGRAMS_NAME
from pocketlm_exporters import drafts
from pocketlm_exporters.drafts import LEAST_CHANCE, add_ngrams, count
from pocketlm_exporters.export import export

Call = tuple[str, int, int, str]


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "ANSWER_TOKENS", 6)


def test_what_follows_most_often_is_kept() -> None:
    entries = count([[1, 2, 3, 4], [9, 2, 3, 5], [9, 2, 3, 5]])
    assert entries[2,] == (3, 3 / 4)
    assert entries[3,] == (5, 2 / 4)
    assert entries[1, 2, 3] == (4, 1 / 2)
    assert entries[9, 2, 3] == (5, 2 / 3)
    assert (4,) not in entries  # nothing followed
    assert (3, 9) not in entries  # two answers do not touch


def test_of_equally_frequent_tokens_the_first_id_is_kept() -> None:
    assert count([[1, 3, 1, 2]])[1,] == (2, 1 / 3)


def test_unlikely_tokens_are_left_out() -> None:
    assert count([[1, n] for n in range(2, 5)])[1,] == (2, 1 / 4)
    assert (1,) not in count([[1, n] for n in range(2, 6)])


def test_the_most_frequent_have_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "MOST_ENTRIES", 2)
    assert count([[1, 2], [3, 4], [3, 4], [5, 6]]) == {(3,): (4, 2 / 3), (1,): (2, 1 / 2)}


@given(st.lists(st.lists(st.integers(0, 3), max_size=20), max_size=4))
def test_chances_are_shares_of_what_followed(answers: list[list[int]]) -> None:
    entries = count(answers)
    for context, (token_id, chance) in entries.items():
        followers = Counter(
            ids[n + len(context)]
            for ids in answers
            for n in range(len(ids) - len(context))
            if tuple(ids[n : n + len(context)]) == context
        )
        assert followers[token_id] == max(followers.values())
        assert chance == followers[token_id] / (followers.total() + 1) >= LEAST_CHANCE


def test_a_table_comes_with_the_bundle(tmp_path: Path, short_answers: None) -> None:
    calls: list[Call] = []
    source = write_folder(tmp_path / "checkpoint", tiny_checkpoint())
    manifest = export(
        source,
        tmp_path / "bundle",
        precision="fp32",
        ngrams=150,
        progress=lambda *call: calls.append(call),
    )
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    assert bundle.manifest == manifest
    assert NGRAMS_NAME in manifest.files
    assert bundle.ngrams is not None
    assert len(bundle.ngrams) > 50
    generating = [call[1:] for call in calls if call[0] == "Generating"]
    assert generating[0] == (0, 150, "tokens")
    assert generating[-1] == (150, 150, "tokens")
    assert generating == sorted(generating)


def test_the_same_model_gives_the_same_table(tmp_path: Path, short_answers: None) -> None:
    source = write_folder(tmp_path / "checkpoint", tiny_checkpoint())
    tables = []
    for name in ("one", "two"):
        export(source, tmp_path / name, precision="fp32", ngrams=100)
        tables.append((tmp_path / name / NGRAMS_NAME).read_bytes())
    assert tables[0] == tables[1]


def test_no_table_by_default(fp32_bundle: Path) -> None:
    assert open_bundle(fp32_bundle, verify=False).ngrams is None


def test_the_prompts_are_used_up_where_answers_are_short(
    fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(drafts, "_MOST_ROUNDS", 1)
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in fp32_bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    calls: list[Call] = []
    add_ngrams(copy, read_manifest(copy), 10_000, lambda *call: calls.append(call))
    assert calls[-1] == ("Generating", 10_000, 10_000, "tokens")
    assert open_bundle(copy, verify=True).ngrams is not None


def test_a_number_of_tokens_below_zero_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "checkpoint", tiny_checkpoint())
    with pytest.raises(InvalidSettingError, match="ngrams is -1"):
        export(source, tmp_path / "bundle", ngrams=-1)
    assert not (tmp_path / "bundle").exists()


def test_a_table_of_nothing_is_refused(fp32_bundle: Path) -> None:
    with pytest.raises(InvalidSettingError, match="at least 1 generated token, not 0"):
        add_ngrams(fp32_bundle, read_manifest(fp32_bundle), 0, lambda *call: None)


def test_the_command_has_the_option(tmp_path: Path, short_answers: None) -> None:
    write_folder(tmp_path / "checkpoint", tiny_checkpoint())
    result = CliRunner().invoke(
        build_app(),
        [
            *("export", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "bundle")),
            *("--precision", "fp32", "--ngrams", "20", "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert NGRAMS_NAME in json.loads(result.stdout)["files"]
