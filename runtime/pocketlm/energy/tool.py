"""Small command line tools that print what a sensor says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence

from pocketlm.errors import PocketlmError

RunTool = Callable[[Sequence[str]], str]
"""Runs a command and returns what it prints; raises ToolError."""


class ToolError(PocketlmError):
    """A tool is missing, fails, or does not answer in time."""


def run_tool(command: Sequence[str], timeout_s: float = 2.0) -> str:
    """What `command` prints; never through a shell and never with anything to read from a terminal.

    Raises ToolError where the tool is missing, does not end within `timeout_s`, or ends with an error.
    """
    name = command[0]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # some tools explain themselves on one, some on the other
            timeout=timeout_s,
            check=False,
            env={**os.environ, "LC_ALL": "C"},  # decimal points
        )
    except FileNotFoundError:
        raise ToolError(f"{name} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ToolError(f"{name} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise ToolError(f"{name} cannot be run: {error}") from None
    text = done.stdout.decode("utf-8", errors="replace")
    if done.returncode != 0:
        raise ToolError(
            f"{name} ends with status {done.returncode}: {' '.join(text.split()) or 'no message'}"
        )
    return text
