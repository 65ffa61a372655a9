"""What an answer has cost, as the APIs report it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocketlm.generate import Completion


def prompt_tokens(completions: Sequence[Completion]) -> int:
    """Several answers share one prompt."""
    return completions[0].usage.prompt_tokens


def cached_tokens(completions: Sequence[Completion]) -> int:
    return completions[0].usage.cached_tokens


def completion_tokens(completions: Sequence[Completion]) -> int:
    return sum(each.usage.completion_tokens for each in completions)


def timings(completion: Completion) -> dict[str, Any]:
    """By llama-server's names. `prompt_n` counts the tokens that were computed, `cache_n` those found in a
    cache. The first token of the answer belongs to the prompt's time, so rates count those behind it."""
    usage, times = completion.usage, completion.timings
    computed, decoded = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    prompt_ms, predicted_ms = 1000 * times.prefill_s, 1000 * times.decode_s
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / computed if computed else None,
        "prompt_per_second": times.prefill_tokens_per_s,
        "predicted_n": decoded,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / (decoded - 1) if decoded > 1 else None,
        "predicted_per_second": times.decode_tokens_per_s,
        "draft_n": times.drafted_tokens,
        "draft_n_accepted": times.accepted_tokens,
        "queue_ms": 1000 * times.queue_s,
        "ttft_ms": 1000 * times.ttft_s,
    }
