"""Drafts for a request: which tokens may come next, and how many of them to verify in one pass.

Speculative decoding (arXiv 2211.17192) without a second model, or with one. Drafts come from

1. the request's own text (`PromptLookup`),
2. the bundle's table of n-grams, made from the model's own answers,
3. a draft model, if the caller brings one.

What is drafted is only ever verified, so it changes how fast an answer comes and never which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pocketlm.ngrams import LONGEST_CONTEXT, NgramTable
from pocketlm.prompt_lookup import LONGEST_MATCH, PromptLookup
from pocketlm.row_costs import RowCosts

LONGEST_DRAFT = 15
"""Tokens: sixteen rows with the newest token, the most that `row_costs` measures."""

LEAST_GAIN = 1.05
"""Expected tokens of a pass over its cost, relative to a pass without a draft, that make a draft worth it.
What it is above 1 pays for the work beside the pass."""

CAREFUL_GAIN = 1.3
"""The same while a request's drafts have not paid: so they never cost much, however wrong the chances."""

_LEAST_CHANCE = 0.05  # of a whole draft: with one more token it would not pay
_SURE = 0.7  # chance of a match from which on the table is not asked
_DEPTH_STEP = 64  # tokens of context behind which the costs of rows are looked up anew


class Drafter(Protocol):
    """A draft model at work on one request."""

    @property
    def cost(self) -> float:
        """Of one drafted token, as a multiple of the large model's pass over a single token."""

    def draft(self, ids: Sequence[int], limit: int) -> list[tuple[int, float]]:
        """At most `limit` tokens that may follow `ids`, each with its chance given those before it."""


class Speculator:
    """The drafts of one request.

    It learns from the tokens alone how far each kind of draft can be trusted, so that the same request makes
    the same proposals. Drafts that do not pay are still compared with what comes: where an answer begins to
    repeat the text, that shows before anything is risked.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        costs: RowCosts,
        *,
        table: NgramTable | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.drafted = 0
        """Tokens proposed so far."""
        self.accepted = 0
        """Those of them that were right."""
        self._lookup = PromptLookup(prompt_ids)
        self._costs = costs
        self._curve: list[float] = []
        self._curve_depth = -1
        self._table = table
        self._drafter = drafter
        self._trust = _Trust()
        self._draft: list[tuple[int, int]] = []  # tokens and their kinds
        self._proposed = 0
        self._balance = 0.0  # passes saved so far, less what verifying cost

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens to verify behind the newest one; none where that would not pay."""
        limit = max(0, min(limit, LONGEST_DRAFT))
        self._update_curve()
        self._draft = self._own_draft()
        self._proposed, gain = self._best_length(limit)
        if self._drafter is not None:
            self._ask(self._drafter, limit, gain)
        self.drafted += self._proposed
        self._balance -= self._curve[self._proposed] - 1
        return [token_id for token_id, _ in self._draft[: self._proposed]]

    def advance(self, ids: Sequence[int]) -> None:
        """Takes note of the tokens that the step really added: what was right of the proposal, then one."""
        for place, ((drafted, kind), token_id) in enumerate(zip(self._draft, ids, strict=False)):
            self._trust.learn(kind, drafted == token_id)
            if drafted != token_id:
                break
            self.accepted += place < self._proposed
            self._balance += place < self._proposed
        self._draft, self._proposed = [], 0
        self._lookup.extend(ids)

    def _own_draft(self) -> list[tuple[int, int]]:
        """Token by token what is likelier to be right there, from a match in the text or from the table."""
        text, chances, table = self._lookup.text, self._trust.chances, self._table
        end = len(text)
        length, places = self._lookup.matches()
        draft: list[tuple[int, int]] = []
        chance = 1.0
        while len(draft) < LONGEST_DRAFT and chance > _LEAST_CHANCE:
            token_id, kind = -1, _NOTHING
            # A match that reaches the end of the text goes on with the draft: a period repeats.
            following = [text[place] if place < end else draft[place - end][0] for place in places]
            if following:
                token_id, kind = following[0], _match_kind(following, length)
            if table is not None and chances[kind] < _SURE:
                recent = [*text[-LONGEST_CONTEXT:], *(each for each, _ in draft[-LONGEST_CONTEXT:])]
                expected = table.expect(recent)
                if expected is not None and chances[_kind("table", expected[1])] > chances[kind]:
                    token_id, kind = expected[0], _kind("table", expected[1])
            if kind == _NOTHING:
                break
            draft.append((token_id, kind))
            chance *= chances[kind]
            places = [p + 1 for p, other in zip(places, following, strict=True) if other == token_id]
            length += 1
        return draft

    def _ask(self, drafter: Drafter, limit: int, gain: float) -> None:
        """Takes the draft model's draft, if it promises more than the `gain` of the one that there is."""
        asked = self._worth_asking(limit, gain, drafter.cost)
        likely = drafter.draft(self._lookup.text, asked) if asked else []
        if likely:
            self._balance -= len(likely) * drafter.cost
            self._draft = [(token_id, _kind("drafter", chance)) for token_id, chance in likely]
            self._proposed, _ = self._best_length(asked)

    def _best_length(self, limit: int) -> tuple[int, float]:
        """The draft length with the most expected tokens for its cost, and that gain; 0 where none pays."""
        best, best_gain = 0, self._least_gain()
        expected = chance = 1.0
        for count, (_, kind) in enumerate(self._draft[:limit], 1):
            chance *= self._trust.chances[kind]
            expected += chance
            gain = expected / self._curve[count]
            if gain > best_gain:
                best, best_gain = count, gain
        return best, best_gain if best else 1.0

    def _worth_asking(self, limit: int, least_gain: float, cost: float) -> int:
        """How many tokens to ask the draft model for; 0 where its drafts are not worth their time."""
        best, best_gain = 0, max(least_gain, self._least_gain())
        expected = chance = 1.0
        for count in range(1, limit + 1):
            chance *= self._trust.drafter
            expected += chance
            gain = expected / (self._curve[count] + count * cost)
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def _least_gain(self) -> float:
        return LEAST_GAIN if self._balance > 0 else CAREFUL_GAIN

    def _update_curve(self) -> None:
        depth = len(self._lookup.text) // _DEPTH_STEP * _DEPTH_STEP
        if depth != self._curve_depth:
            self._curve = self._costs.curve(LONGEST_DRAFT + 1, depth)
            self._curve_depth = depth


class _Trust:
    """How often each kind of drafted token was right, the latest counting most.

    Begins as if `_PRIOR` had been seen `_WEIGHT` times.
    """

    def __init__(self) -> None:
        self.chances = list(_PRIOR)
        self.drafter = _DRAFTER_PRIOR
        self._tried = [_WEIGHT] * len(_PRIOR)

    def learn(self, kind: int, right: bool) -> None:
        tried = self._tried[kind] * _MEMORY
        self._tried[kind] = tried + 1
        self.chances[kind] = (self.chances[kind] * tried + right) / (tried + 1)
        if kind >= _FIRST["drafter"]:
            self.drafter += (right - self.drafter) / _WEIGHT / 2


# Fitted on greedy answers of SmolLM2-135M; a request's own tokens soon outweigh them.
_WEIGHT = 8.0
_MEMORY = 0.98
_DRAFTER_PRIOR = 0.7

_CHANCES = {
    # Matches, by the bits of their length: of 0, 1, 2 to 3, 4 to 7, 8 to 15 and more tokens.
    "single": (0.0, 0.25, 0.6, 0.8, 0.93, 0.95),  # there is one place
    "agreed": (0.0, 0.5, 0.83, 0.93, 0.95, 0.99),  # all places go on alike
    "split": (0.0, 0.1, 0.2, 0.4, 0.45, 0.5),
    # By eighths of the chance that they come with.
    "table": (0.1, 0.16, 0.16, 0.2, 0.24, 0.4, 0.55, 0.6),
    "drafter": (0.06, 0.19, 0.31, 0.44, 0.56, 0.69, 0.81, 0.94),
}
_PRIOR = (0.0, *(chance for chances in _CHANCES.values() for chance in chances))
_NOTHING = 0
_FIRST: dict[str, int] = {}
for _source in _CHANCES:
    _FIRST[_source] = 1 + sum(len(_CHANCES[before]) for before in _FIRST)
_SINGLE, _AGREED, _SPLIT = (_FIRST[_source] for _source in ("single", "agreed", "split"))
_LEVELS = tuple(min(5, length.bit_length()) for length in range(LONGEST_MATCH + LONGEST_DRAFT + 1))


def _kind(source: str, chance: float) -> int:
    """Of a token that comes with a chance."""
    return _FIRST[source] + min(7, int(chance * 8))


def _match_kind(following: Sequence[int], length: int) -> int:
    """Of the first of the tokens that follow the places of a match."""
    if len(following) == 1:
        return _SINGLE + _LEVELS[length]
    agreed = following.count(following[0]) == len(following)
    return (_AGREED if agreed else _SPLIT) + _LEVELS[length]
