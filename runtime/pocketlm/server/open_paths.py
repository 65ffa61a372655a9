"""What anybody may fetch who reaches the server: the chat page, which asks for the key, and /health."""

from __future__ import annotations

from pocketlm.server import page

OPEN_PATHS = page.PATHS | {"/health", "/favicon.ico"}  # browsers ask for the last one unasked


def is_open(path: str) -> bool:
    """Whether `path` needs no API key, and may be linked to from other sites."""
    return path in OPEN_PATHS
