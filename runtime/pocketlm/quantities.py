"""Sizes and durations as people write them: `8MB`, `2GiB`, `90`, `10m`, `1h30m`."""

from __future__ import annotations

import re

from pocketlm.errors import InvalidSettingError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]i?)?b?)", re.IGNORECASE)
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}

_PART = r"[0-9]+(?:\.[0-9]+)?"
_PARTS = re.compile(rf"({_PART})(ms|s|m|h|d)", re.IGNORECASE)
_DURATION = re.compile(rf"-?(?:{_PART}|(?:{_PARTS.pattern})+)", re.IGNORECASE)
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_LONGEST = 40
"""Characters: what is longer is no number that anybody means, and would take its time to read."""


def parse_bytes(text: str) -> int:
    """Bytes: a number alone, or with kB, MB, GB, TB (of 1000) or KiB, MiB, GiB, TiB (of 1024).

    Raises InvalidSettingError.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None:
        raise InvalidSettingError(
            f"{text[:_LONGEST]!r} is no size. Give a number of bytes, or one with a unit, as 8MB or 2GiB."
        )
    unit = (match[2] or "").lower()
    return round(float(match[1]) * (_DECIMAL.get(unit) or _BINARY[unit]))


def parse_seconds(text: str) -> float:
    """Seconds: a number alone, or numbers with ms, s, m, h or d behind them; a minus sign may stand before.

    Raises InvalidSettingError.
    """
    stripped = text.strip()
    if len(text) > _LONGEST or not _DURATION.fullmatch(stripped):
        raise InvalidSettingError(
            f"{text[:_LONGEST]!r} is no duration. Give a number of seconds, or one with a unit, as 90s, 10m "
            "or 1h30m."
        )
    sign = -1.0 if stripped.startswith("-") else 1.0
    parts = _PARTS.findall(stripped)
    if not parts:
        return float(stripped)
    return sign * sum(float(number) * _UNITS_S[unit.lower()] for number, unit in parts)
