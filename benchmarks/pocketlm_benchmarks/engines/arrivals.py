"""Times of a query's tokens → its trace, for engines that hand the tokens over one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pocketlm_benchmarks.engines.protocol import EngineError, Query, Trace


def trace_of(
    query: Query, *, handed_over_s: float, arrivals_s: Sequence[float], text: str, cached_tokens: int = 0
) -> Trace:
    """`arrivals_s` holds one time a token, on the clock of `handed_over_s`.

    Raises EngineError if there are fewer or more than the query asks for.
    """
    if len(arrivals_s) != query.new_tokens:
        raise EngineError(f"{len(arrivals_s)} tokens came, {query.new_tokens} were asked for")
    return Trace(
        prompt_tokens=len(query.prompt_ids),
        cached_tokens=cached_tokens,
        new_tokens=len(arrivals_s),
        prefill_s=arrivals_s[0] - handed_over_s,
        decode_s=arrivals_s[-1] - arrivals_s[0] if len(arrivals_s) > 1 else None,
        decode_tokens=len(arrivals_s) - 1,
        gaps_s=tuple(later - earlier for earlier, later in pairwise(arrivals_s)),
        text=text,
    )
