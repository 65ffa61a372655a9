"""Times and durations as Ollama has them."""

from __future__ import annotations

from datetime import UTC, datetime


def nanoseconds(seconds: float) -> int:
    """At least one: clients divide by durations."""
    return max(1, round(seconds * 1e9))


def timestamp(epoch_s: float) -> str:
    """RFC 3339, in UTC."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
