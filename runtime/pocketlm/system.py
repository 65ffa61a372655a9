"""Reading what a system tells in small files and through small programs; None where it tells nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

_PATIENCE_S = 5.0


def read_text(path: Path) -> str | None:
    """The file's text without surrounding white space and NULs, None if it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # drivers answer some reads with an error, permissions or not
        return None
    return text.strip(" \t\n\0") or None


def read_int(path: Path) -> int | None:
    """The decimal number that the file holds, None if it holds none."""
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def fields(text: str | None) -> dict[str, str]:
    """`key: value` lines, as /proc and sysctl write them; of a key that comes again the first value."""
    found: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def command_output(command: Sequence[str]) -> str | None:
    """What a program prints; None if it is not there, fails or takes more than a few seconds."""
    try:
        finished = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout
