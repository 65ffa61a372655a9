"""Where the end of a text occurred before: what came next there may come next again.

Prompt lookup decoding (Saxena, 2023), with the longest match through an index that grows with the text as in
suffix decoding (arXiv 2411.04975).
"""

from __future__ import annotations

from collections.abc import Sequence

ORDERS = (4, 2, 1)
"""Lengths of the n-grams that are indexed. The longest that occurred before is where matches begin."""

LONGEST_MATCH = 16  # tokens that are compared; more tell nothing new
_CANDIDATES = 4  # newest places that are looked at


class PromptLookup:
    """The text so far, and an index of its n-grams: for each its newest place, for each place the one before.

    A place is where the token behind the n-gram stands.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.text: list[int] = []
        self._indices = tuple(_Index(order) for order in ORDERS)
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        self.text.extend(ids)
        for index in self._indices:
            index.extend(self.text)

    def matches(self) -> tuple[int, list[int]]:
        """How long the longest match is, and the places behind all matches, the longest first.

        (0, []) where the last token is new. Among matches of equal length the newest comes first.
        """
        for index in self._indices:
            if places := index.places(self.text, _CANDIDATES):
                lengths = [self._match_length(index.order, place) for place in places]
                longest = max(lengths)
                if lengths[0] != longest:
                    ranked = sorted(zip(lengths, places, strict=True), reverse=True)
                    places = [place for _, place in ranked]
                return longest, places
        return 0, []

    def _match_length(self, length: int, place: int) -> int:
        text, end = self.text, len(self.text)
        longest = min(LONGEST_MATCH, place)
        if text[place - longest : place] == text[end - longest :]:
            return longest
        while text[place - length - 1] == text[end - length - 1]:
            length += 1
        return length


class _Index:
    """The places of all n-grams of one order."""

    def __init__(self, order: int) -> None:
        self.order = order
        self._newest: dict[tuple[int, ...], int] = {}
        self._previous = [-1] * order  # by place

    def extend(self, text: Sequence[int]) -> None:
        """Takes note of what the text has become. The end is left out until something follows it."""
        order, newest, previous = self.order, self._newest, self._previous
        fresh = text[len(previous) - order : -1]
        ngrams = zip(*(fresh[skip:] for skip in range(order)), strict=False)
        for place, ngram in enumerate(ngrams, len(previous)):
            previous.append(newest.get(ngram, -1))
            newest[ngram] = place

    def places(self, text: Sequence[int], limit: int) -> list[int]:
        """The newest `limit` places behind what the text ends with, the newest first."""
        place = self._newest.get(tuple(text[-self.order :]), -1)
        places: list[int] = []
        while place >= 0 and len(places) < limit:
            places.append(place)
            place = self._previous[place]
        return places
