"""What answers have cost and why they have ended, as OpenAI's API reports it."""

from __future__ import annotations

import importlib.metadata
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pocketlm.energy import Reading
from pocketlm.generate import Completion
from pocketlm.manifest import Manifest
from pocketlm.server import reports
from pocketlm.server.answers import Result
from pocketlm.server.errors import ApiError

_VERSION = importlib.metadata.version("pocketlm")
_REASONS = {"stop": "stop", "length": "length", "timeout": "length"}


def finish_reason(completion: Completion) -> str:
    """Raises ApiError for an answer that the server has broken off."""
    reason = _REASONS.get(completion.finish_reason)
    if reason is None:
        raise ApiError(503, "The server has ended the answer: it is shutting down.", code="cancelled")
    return "tool_calls" if reason == "stop" and completion.tool_calls else reason


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """Of the answers to each of several prompts, or to one. `energy` and `dropped_messages` (left out of a
    conversation that outgrew the context, if that was asked for) are pocketlm's own."""
    answers = [result.completions for result in results]
    prompt, generated = sum(map(reports.prompt_tokens, answers)), sum(map(reports.completion_tokens, answers))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(map(reports.cached_tokens, answers))},
        "dropped_messages": sum(each[0].usage.dropped_messages for each in answers),
        "energy": together([result.reading for result in results]).as_object(),
    }


def together(readings: Sequence[Reading]) -> Reading:
    """One reading for the shares that each of several prompts has of the same probe's energy."""
    first = readings[0]
    if len(readings) == 1:
        return first
    missing = next((each for each in readings if each.energy_j is None), None)
    flags = tuple(dict.fromkeys(flag for each in readings for flag in each.flags))
    whole = replace(first, duration_s=max(each.duration_s for each in readings), flags=flags, parts_j={})
    if missing is not None:
        return replace(whole, energy_j=None, low_j=None, high_j=None, reason=missing.reason)
    return replace(
        whole,
        energy_j=_sum([each.energy_j for each in readings]),
        low_j=_sum([each.low_j for each in readings]),
        high_j=_sum([each.high_j for each in readings]),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def system_fingerprint(manifest: Manifest) -> str:
    """The same for the same files and version: what a seed's text depends on."""
    return f"fp_{manifest.digest()[:12]}_{_VERSION}"


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
