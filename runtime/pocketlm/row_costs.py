"""What a forward pass costs by how many tokens go into it: the measure of every draft.

A small model's step mostly waits for weights, which several rows share; how much the rows beyond the first
cost depends on the processor, its kernels and how many tokens attention has to look back on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocketlm.errors import InvalidSettingError
from pocketlm.session import Session

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
DEPTHS = (0, 512, 2048)

_LEAST_ROUNDS = 3  # of which the first only warms up
_MOST_ROUNDS = 10


@dataclass(frozen=True)
class RowCosts:
    """Durations of forward passes.

    `seconds[d][r]` is that of a pass over `rows[r]` tokens behind `depths[d]` cached ones, with the logits of
    each. Raises InvalidSettingError unless rows begin at 1, both ascend and all durations are positive.
    """

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _check_ascending("rows", self.rows, least=1)
        _check_ascending("depths", self.depths, least=0)
        if self.rows[0] != 1:
            raise InvalidSettingError(f"Row costs begin at {self.rows[0]} rows; expected 1, the unit.")
        if [len(line) for line in self.seconds] != [len(self.rows)] * len(self.depths):
            raise InvalidSettingError(
                f"Row costs hold durations for {[len(line) for line in self.seconds]} rows a depth; expected "
                f"{len(self.rows)} for each of {len(self.depths)} depths."
            )
        for second in (second for line in self.seconds for second in line):
            if not (_is_number(second) and math.isfinite(second) and second > 0):
                raise InvalidSettingError(f"Row costs hold the duration {second!r}; a positive is expected.")

    def ratio(self, rows: int, depth: int) -> float:
        """A pass with `rows` tokens behind `depth` cached ones, as a multiple of one with a single token.

        Linear between what was measured, and on beyond the most rows; never less for more rows.
        """
        return self.curve(rows, depth)[-1]

    def curve(self, rows: int, depth: int) -> list[float]:
        """`ratio` for 1 … `rows` tokens."""
        seconds = self._at(depth)
        ratios, following = [], 1
        for count in range(1, rows + 1):
            while following < len(seconds) - 1 and self.rows[following] < count:
                following += 1
            ratios.append(_line(self.rows, seconds, following, count) / seconds[0])
        return ratios

    def in_pairs(self) -> RowCosts:
        """The same for an engine that computes a single token as two rows: the second then costs nothing."""
        if 2 not in self.rows:
            return self
        return dataclasses.replace(self, seconds=tuple((max(line[:2]), *line[1:]) for line in self.seconds))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RowCosts:
        """What `to_json` wrote. Raises InvalidSettingError for anything else."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InvalidSettingError(f"Row costs are not valid JSON: {error}. Measure them again.") from None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            raise InvalidSettingError(f"Row costs need the fields {', '.join(names)} and no other.")
        rows, depths, seconds = (_tuples(data[name]) for name in names)
        if not all(isinstance(each, tuple) for each in (rows, depths, seconds, *seconds)):
            raise InvalidSettingError("Row costs hold something other than lists. Measure them again.")
        return cls(rows, depths, seconds)

    def _at(self, depth: int) -> list[float]:
        """Durations by `rows`, made monotone: a noisy measurement must not promise rows below nothing."""
        upper = min(max(1, bisect_left(self.depths, depth)), len(self.depths) - 1)
        lower = max(0, upper - 1)
        span = self.depths[upper] - self.depths[lower]
        share = min(1.0, max(0.0, (depth - self.depths[lower]) / span)) if span else 0.0
        longest, monotone = 0.0, []
        for near, far in zip(self.seconds[lower], self.seconds[upper], strict=True):
            longest = max(longest, near + share * (far - near))
            monotone.append(longest)
        return monotone


def measure(session: Session, *, context_length: int | None = None, budget_s: float = 0.5) -> RowCosts:
    """Times passes on this device, for `budget_s` seconds or three rounds: a second at 100 tokens a second.

    All sizes take turns, so that a busy moment does not hit one of them alone; medians count.
    `context_length` is the most tokens that will be in a cache, by default what the model was trained for.
    """
    context_length = context_length or session.dimensions.context_length
    rows = [count for count in ROWS if count <= context_length]
    depths = [depth for depth in DEPTHS if depth + rows[-1] <= context_length]
    cache = session.new_cache(depths[-1] + rows[-1])
    # Memory that was never written is one page of zeros, which attention would read faster than any text.
    cache.buffer[..., : depths[-1], :] = 0.01
    times_s: dict[tuple[int, int], list[float]] = {(depth, count): [] for depth in depths for count in rows}
    started = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() - started > budget_s:
            break
        for (depth, count), measured_s in times_s.items():
            cache.truncate(0)
            cache.append([0] * depth)
            begun = time.perf_counter()
            session.forward([0] * count, cache, range(count))
            measured_s.append(time.perf_counter() - begun)
    return RowCosts(
        tuple(rows),
        tuple(depths),
        tuple(tuple(statistics.median(times_s[depth, count][1:]) for count in rows) for depth in depths),
    )


def _line(xs: Sequence[int], ys: Sequence[float], following: int, x: int) -> float:
    """At `x`, the line through the points `following` − 1 and `following`."""
    if len(xs) == 1:
        return ys[0] * x  # nothing is known of more rows, so they are taken to save nothing
    left, right = xs[following - 1], xs[following]
    return ys[following - 1] + (ys[following] - ys[following - 1]) * (x - left) / (right - left)


def _check_ascending(name: str, numbers: Sequence[Any], *, least: int) -> None:
    integers = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    ascending = integers and all(a < b for a, b in itertools.pairwise(numbers))
    if not numbers or not ascending or numbers[0] < least:
        raise InvalidSettingError(
            f"The {name} of row costs are {numbers!r}; ascending whole numbers from {least} on are expected."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


ASSUMED = RowCosts(
    rows=(1, 2, 3, 4, 8, 16),
    depths=(0, 512, 2048),
    seconds=(
        (1.0, 1.10, 1.20, 1.30, 1.95, 3.1),
        (1.0, 1.15, 1.25, 1.30, 1.75, 3.0),
        (1.0, 1.45, 1.50, 1.50, 2.10, 3.3),
    ),
)
"""For a device that was not measured: as multiples of one row, as on a slow processor without VNNI."""
