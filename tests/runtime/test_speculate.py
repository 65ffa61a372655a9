"""Drafts: they change how many passes an answer takes and nothing else, and hold back where they fail."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.ngrams import NGRAMS_NAME, NgramTable, write_table
from pocketlm.prompt_lookup import LONGEST_MATCH, ORDERS, PromptLookup
from pocketlm.row_costs import ASSUMED, RowCosts
from pocketlm.speculate import LONGEST_DRAFT, Drafter, Speculator

VOCABULARY = 1000
FREE = RowCosts((1, 2), (0,), ((1.0, 1.0),))
"""Rows that cost nothing: every draft is worth its risk."""

few = st.lists(st.integers(0, 3), max_size=60)  # of few tokens, so that much repeats
many = st.lists(st.integers(0, VOCABULARY - 1), max_size=60)
texts = few | many


@dataclass
class Replay:
    """What came of an answer that was drafted and verified."""

    answer: list[int]
    proposals: list[list[int]]
    cost: float  # passes over one token

    @property
    def gain(self) -> float:
        return (len(self.answer) - 1) / self.cost


def replay(
    speculator: Speculator,
    prompt: Sequence[int],
    truth: Sequence[int],
    *,
    limits: Sequence[int] = (LONGEST_DRAFT,),
    costs: RowCosts = ASSUMED,
) -> Replay:
    """Plays the engine: of a proposal it takes what agrees with `truth`, and one token more."""
    answer = list(truth[:1])
    speculator.advance(answer)
    proposals: list[list[int]] = []
    cost = 0.0
    while len(answer) < len(truth):
        limit = min(limits[len(proposals) % len(limits)], len(truth) - len(answer) - 1)
        proposal = speculator.propose(limit)
        assert len(proposal) <= max(0, limit)
        proposals.append(proposal)
        cost += costs.ratio(1 + len(proposal), len(prompt) + len(answer))
        right = 0
        while right < len(proposal) and proposal[right] == truth[len(answer) + right]:
            right += 1
        taken = truth[len(answer) : len(answer) + right + 1]
        speculator.advance(taken)
        answer.extend(taken)
    return Replay(answer, proposals, cost)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> NgramTable:
    """A table in which each of a hundred tokens is followed by the next."""
    path = tmp_path_factory.mktemp("table") / NGRAMS_NAME
    write_table(path, {(n,): (n + 1, 0.9) for n in range(100)})
    return NgramTable.load(path, VOCABULARY)


@dataclass
class ScriptedDrafter:
    """Goes on as its script does behind as many tokens, of which every `wrong`-th is another."""

    script: Sequence[int]
    cost: float = 0.1
    chance: float = 0.95
    wrong: int = 10_000
    asked: list[int] = field(default_factory=list)

    def draft(self, ids: Sequence[int], limit: int) -> list[tuple[int, float]]:
        self.asked.append(limit)
        place = range(len(ids), min(len(ids) + limit, len(self.script)))
        return [((self.script[n] + (n % self.wrong == 0)) % VOCABULARY, self.chance) for n in place]


@given(texts, texts, st.lists(st.integers(-1, 20), min_size=1, max_size=5), st.booleans())
def test_any_answer_comes_out_as_it_is(
    table: NgramTable, prompt: list[int], truth: list[int], limits: list[int], drafting: bool
) -> None:
    known = {*prompt, *truth, *range(101)}

    def run(costs: RowCosts) -> tuple[Replay, Speculator]:
        drafter = ScriptedDrafter([*prompt, *truth], wrong=3) if drafting else None
        speculator = Speculator(prompt, costs, table=table, drafter=drafter)
        return replay(speculator, prompt, truth, limits=limits, costs=costs), speculator

    for costs in (ASSUMED, FREE):
        first, speculator = run(costs)
        assert first.answer == truth
        assert speculator.drafted == sum(map(len, first.proposals))
        assert speculator.accepted == len(truth) - len(truth[:1]) - len(first.proposals)
        assert run(costs)[0].proposals == first.proposals
        drafted = {token_id for proposal in first.proposals for token_id in proposal}
        if drafting:
            assert all(0 <= token_id < VOCABULARY for token_id in drafted)
        else:
            assert drafted <= known


@given(texts, st.lists(texts, max_size=4))
def test_the_index_grows_with_the_text(prompt: list[int], parts: list[list[int]]) -> None:
    grown = PromptLookup(prompt)
    for part in parts:
        grown.extend(part)
    text = [*prompt, *(token_id for part in parts for token_id in part)]
    assert grown.text == text
    assert grown.matches() == PromptLookup(text).matches()


@given(texts)
def test_matches_are_where_the_end_occurred_before(text: list[int]) -> None:
    def length_at(place: int) -> int:
        longest = min(place, LONGEST_MATCH)
        return next((n for n in range(longest) if text[place - n - 1] != text[-n - 1]), longest)

    length, places = PromptLookup(text).matches()
    by_order = [[place for place in range(n, len(text)) if length_at(place) >= n] for n in ORDERS]
    newest = next((list(reversed(found))[:4] for found in by_order if found), [])
    assert places == sorted(newest, key=lambda place: (-length_at(place), -place))
    assert length == (length_at(places[0]) if places else 0)


def test_a_copied_text_is_drafted_at_full_length() -> None:
    prompt = random.Random(0).sample(range(VOCABULARY), 300)
    speculator = Speculator(prompt, ASSUMED)
    result = replay(speculator, prompt, prompt)
    assert max(map(len, result.proposals)) == LONGEST_DRAFT
    assert speculator.accepted / speculator.drafted > 0.9
    assert result.gain > 3


def test_a_period_is_drafted_beyond_the_end_of_the_text() -> None:
    truth = [5, 6, 7] * 60
    result = replay(Speculator([1, 2], ASSUMED), [1, 2], truth)
    assert max(map(len, result.proposals)) == LONGEST_DRAFT
    assert result.gain > 3


@pytest.mark.parametrize("vocabulary", [10, 100, 1000])
def test_chance_is_not_drafted_for_long(vocabulary: int) -> None:
    source = random.Random(vocabulary)
    prompt, truth = ([source.randrange(vocabulary) for _ in range(n)] for n in (300, 600))
    speculator = Speculator(prompt, ASSUMED)
    result = replay(speculator, prompt, truth)
    late = result.proposals[len(result.proposals) // 2 :]
    assert sum(map(len, late)) < 0.1 * len(late)
    assert result.gain > 0.98


def test_an_answer_that_begins_to_copy_is_drafted_again() -> None:
    source = random.Random(1)
    prompt = source.sample(range(VOCABULARY), 200)
    noise = [source.choice(prompt) for _ in range(300)]
    speculator = Speculator(prompt, ASSUMED)
    replay(speculator, prompt, noise)
    assert replay(speculator, [*prompt, *noise], prompt).gain > 2


def test_nothing_is_proposed_where_rows_cost_as_much_as_passes() -> None:
    costs = RowCosts((1, 2), (0,), ((1.0, 2.0),))
    result = replay(Speculator([1] * 50, costs), [1] * 50, [1] * 50, costs=costs)
    assert not any(result.proposals)


def test_drafts_get_longer_as_rows_get_cheaper() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    lengths = []
    for second in (1.0, 1.2, 1.5, 1.9):
        costs = RowCosts((1, 2), (0,), ((1.0, second),))
        lengths.append(len(Speculator(prompt, costs).propose(LONGEST_DRAFT)))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_until_drafts_have_paid_only_promising_ones_are_risked() -> None:
    text = [1, 2, 3, 9, 1, 2, 4, 8, 1, 2]
    doubtful = Speculator(text, FREE)
    assert doubtful.propose(1) == []
    proven = Speculator([5] * 30, FREE)
    proven.advance([5] * len(proven.propose(3)))
    proven.advance(text)
    assert proven.propose(1) == [4]


@pytest.mark.parametrize("limit", [-3, 0])
def test_no_room_no_draft(limit: int) -> None:
    assert Speculator([1] * 50, FREE).propose(limit) == []


def test_agreeing_places_are_trusted_more_than_places_that_differ() -> None:
    costs = RowCosts((1, 2), (0,), ((1.0, 1.3),))
    assert Speculator([1, 2, 3, 9, 1, 2, 3, 8, 1, 2], costs).propose(1) == [3]
    assert Speculator([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], costs).propose(1) == []


def test_a_split_is_decided_by_the_newest_place() -> None:
    text = [1, 2, 3, 4, 9, 7, 1, 2, 3, 4, 8, 7, 1, 2, 3, 4]
    assert Speculator(text, FREE).propose(1) == [8]


def test_the_table_drafts_what_the_text_does_not_have(table: NgramTable) -> None:
    truth = list(range(100))
    without = replay(Speculator([200], ASSUMED), [200], truth)
    with_table = replay(Speculator([200], ASSUMED, table=table), [200], truth)
    assert without.gain == pytest.approx(1)
    assert with_table.gain > 2


def test_a_table_that_is_wrong_is_soon_left_alone(table: NgramTable) -> None:
    truth = list(range(99, -1, -1)) + list(range(99, -1, -2))
    result = replay(Speculator([200], ASSUMED, table=table), [200], truth)
    assert not any(result.proposals[25:90])


def test_a_sure_match_comes_before_the_table(table: NgramTable) -> None:
    text = [10, 12, 14, 16, 18, 20, 22, 24, 26, 28]
    assert Speculator([*text, *text[:8]], FREE, table=table).propose(2) == [26, 28]


def test_a_draft_model_is_asked_and_its_chances_decide() -> None:
    script = random.Random(2).sample(range(VOCABULARY), 300)
    sure, unsure = ScriptedDrafter(script), ScriptedDrafter(script, chance=0.05)
    first, second = (Speculator(script[:50], ASSUMED, drafter=each) for each in (sure, unsure))
    drafts = first.propose(LONGEST_DRAFT)
    assert drafts == script[50 : 50 + len(drafts)]
    assert len(drafts) == sure.asked[0] > 2
    assert len(second.propose(LONGEST_DRAFT)) < len(drafts)
    assert unsure.asked == sure.asked


def test_a_draft_model_that_costs_too_much_is_not_asked() -> None:
    dear = ScriptedDrafter(range(100), cost=1.0)
    assert Speculator(range(50), ASSUMED, drafter=dear).propose(LONGEST_DRAFT) == []
    assert dear.asked == []


def test_a_draft_model_that_is_wrong_is_asked_less() -> None:
    source = random.Random(3)
    script = source.sample(range(VOCABULARY), 500)
    wrong, right = ScriptedDrafter(script, wrong=1), ScriptedDrafter(script)
    for drafter in (wrong, right):
        replay(Speculator(script[:50], ASSUMED, drafter=drafter), script[:50], script[50:])
    assert len(wrong.asked) < 30
    assert sum(right.asked) > 100


def test_a_copy_is_not_asked_of_the_draft_model() -> None:
    prompt = random.Random(4).sample(range(VOCABULARY), 300)
    drafter: ScriptedDrafter = ScriptedDrafter([*prompt, *prompt], cost=0.4)
    protocol: Drafter = drafter
    replay(Speculator(prompt, ASSUMED, drafter=protocol), prompt, prompt)
    assert len(drafter.asked) < 10
