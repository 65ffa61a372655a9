"""A draft model: the tokens of its own greedy answer, whatever of its drafts was taken before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.tiny import VOCABULARY, random_ids, run
from pocketlm.bundle import TOKENIZER_NAME, Bundle, open_bundle
from pocketlm.draft_model import DraftModel
from pocketlm.errors import InvalidSettingError
from pocketlm.row_costs import RowCosts
from pocketlm.session import Session
from pocketlm.speculate import Speculator

FREE = RowCosts((1, 2), (0,), ((1.0, 1.0),))


@pytest.fixture(scope="module")
def bundle(fp32_bundle: Path) -> Bundle:
    return open_bundle(fp32_bundle, verify=False)


@pytest.fixture(scope="module")
def drafts(bundle: Bundle) -> DraftModel:
    return DraftModel(bundle, bundle, threads=1)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Session:
    manifest = bundle.manifest
    return Session(bundle.graph_path, manifest.dimensions, manifest.graph, threads=1)


def greedy(session: Session, ids: list[int], count: int) -> list[tuple[int, float]]:
    """Computed anew for each token."""
    drafted: list[tuple[int, float]] = []
    for _ in range(count):
        logits = run(session, [*ids, *(token_id for token_id, _ in drafted)])[-1].astype(np.float64)
        weights = np.exp(logits - logits.max())
        drafted.append((int(weights.argmax()), float(weights.max() / weights.sum())))
    return drafted


def same(drafted: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    """`expected` as far as `drafted` goes; chances come from other kernels."""
    return all(
        a == b and p == pytest.approx(q, rel=1e-3) for (a, p), (b, q) in zip(drafted, expected, strict=False)
    )


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_drafts_follow_what_was_accepted(drafts: DraftModel, session: Session, data: st.DataObject) -> None:
    sequence, ids = drafts.sequence(200), random_ids(data.draw(st.integers(1, 10)))
    for _ in range(3):
        limit = data.draw(st.integers(1, 5))
        drafted = sequence.draft(ids, limit)
        assert 1 <= len(drafted) <= limit
        assert same(drafted, greedy(session, ids, len(drafted)))
        taken = data.draw(st.integers(0, len(drafted)))
        ids += [token_id for token_id, _ in drafted[:taken]]
        ids += data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3))


def test_another_text_is_read_anew(drafts: DraftModel, session: Session) -> None:
    sequence = drafts.sequence(200)
    sequence.draft(random_ids(150, seed=1), 2)
    other = random_ids(20, seed=2)
    assert same(sequence.draft(other, 2), greedy(session, other, 2))


def test_drafting_ends_where_no_draft_would_hold(drafts: DraftModel) -> None:
    ids = random_ids(10)
    drafted = drafts.sequence(200).draft(ids, 100)
    assert np.prod([chance for _, chance in drafted[:-1]]) >= 0.05 > np.prod([c for _, c in drafted])


@pytest.mark.parametrize(("capacity", "count"), [(20, 20), (20, 25), (10_000, 513)])
def test_no_drafts_beyond_its_context(drafts: DraftModel, capacity: int, count: int) -> None:
    sequence = drafts.sequence(capacity)
    assert len(sequence.draft(random_ids(count), 5)) == (1 if count == capacity else 0)


def test_no_drafts_for_nothing(drafts: DraftModel) -> None:
    sequence = drafts.sequence(20)
    assert sequence.draft([], 5) == []
    assert sequence.draft([1], 0) == []


def test_no_drafts_behind_a_token_that_it_does_not_have(drafts: DraftModel) -> None:
    sequence = drafts.sequence(20)
    assert sequence.draft([1, VOCABULARY], 5) == []
    assert sequence.draft([1, 2], 1) != []


def test_a_model_that_drafts_for_itself_is_right(drafts: DraftModel, session: Session) -> None:
    prompt = list(range(10))  # nothing repeats, so the text itself has no drafts
    sequence = drafts.sequence(200)
    sequence.cost = 0.1  # as if it were smaller than itself
    speculator = Speculator(prompt, FREE, drafter=sequence)
    drafted = speculator.propose(3)
    taken = [token_id for token_id, _ in greedy(session, prompt, len(drafted) + 1)]
    assert drafted == taken[:-1]
    speculator.advance(taken)
    assert speculator.accepted == speculator.drafted > 0


def test_the_cost_is_the_share_of_the_weights(bundle: Bundle, int8_bundle: Path) -> None:
    small = open_bundle(int8_bundle, verify=False)
    assert DraftModel(small, bundle, threads=1).cost == small.manifest.bytes / bundle.manifest.bytes


def test_padding_of_the_vocabulary_is_never_drafted(bundle: Bundle) -> None:
    narrow = dataclasses.replace(bundle.manifest.dimensions, vocabulary=5)
    target = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, dimensions=narrow))
    sequence = DraftModel(bundle, target, threads=1).sequence(50)
    assert all(token_id < 5 for seed in range(5) for token_id, _ in sequence.draft([seed % 5, 1], 8))


def test_another_tokenizer_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    data = json.loads(bundle.tokenizer_json)
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (tmp_path / TOKENIZER_NAME).write_text(json.dumps(data), encoding="utf-8")
    target = Bundle(tmp_path, dataclasses.replace(bundle.manifest, name="large"))
    with pytest.raises(InvalidSettingError, match=r"tiny cannot draft for large: 2 of their tokens differ"):
        DraftModel(bundle, target, threads=1)
