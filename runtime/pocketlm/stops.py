"""Stop strings: where a growing text has to end."""

from __future__ import annotations

from collections.abc import Sequence

from pocketlm.errors import InvalidSettingError


class StopMatcher:
    """Lets a growing text through up to the first stop string, however the text is cut into pieces.

    The stop string that is completed first wins, and the text ends where it begins; of several that are
    completed by the same character, the longest. Only what may still turn out to be the beginning of a
    stop string is held back. Takes constant time per character and stop string, amortised.

    Source: D. Knuth, J. Morris, V. Pratt, "Fast pattern matching in strings", 1977.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InvalidSettingError for a stop string that is empty or no string."""
        # A lone string is a sequence of its characters to Python, which nobody means.
        self._automata = [_Automaton(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
        self._held = ""
        self.stop: str | None = None
        """The stop string that was completed."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to emit now, and whether a stop string has been completed.

        The stop string itself and what follows it are never emitted.
        """
        if self.stop is not None:
            return "", True
        if not self._automata:
            return text, False
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            completed = max(automaton.step(character) for automaton in self._automata)
            if completed:
                self._held, self.stop = "", pending[end - completed : end]
                return pending[: end - completed], True
        safe = len(pending) - max(automaton.matched for automaton in self._automata)
        self._held = pending[safe:]
        return pending[:safe], False

    def flush(self) -> str:
        """What was held back: the text has ended, so it begins no stop string after all."""
        held, self._held = self._held, ""
        for automaton in self._automata:
            automaton.matched = 0
        return held


class _Automaton:
    """How much of one stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        if not isinstance(stop, str) or not stop:
            raise InvalidSettingError(
                f"stop has {stop!r} in it, expected strings of at least one character. Leave it out."
            )
        self._stop = stop
        self._borders = _borders(stop)
        self.matched = 0

    def step(self, character: str) -> int:
        """Follow the text by one character. Returns the stop string's length if that completes it, or 0."""
        while self.matched and self._stop[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        self.matched += self._stop[self.matched] == character
        if self.matched < len(self._stop):
            return 0
        self.matched = 0
        return len(self._stop)


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper suffix that is also its prefix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        length += pattern[index] == pattern[length]
        borders[index] = length
    return borders
