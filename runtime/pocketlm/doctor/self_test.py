"""A model answers in a process that cannot use the network: `python -m pocketlm.doctor.self_test [BUNDLE]`.

That process locks the network before it imports anything that computes. Where the kernel does it, the first
attempt to make a socket ends the process, so one that reports back has made none. Before it does, it has to
see a connection refused: that the lock held.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.doctor.check import Check
from pocketlm.network_lock import NetworkLock, lock_network
from pocketlm.progress import Progress, silent

if TYPE_CHECKING:
    from pocketlm.bundle import Bundle

COMMAND = (sys.executable, "-m", "pocketlm.doctor.self_test")
PATIENCE_S = 300.0
TOKENS = 8

_PROMPT = "Why is the sky blue?"
_CONTEXT_LENGTH = 256
_NOWHERE = "192.0.2.1"  # TEST-NET-1 (RFC 5737); a datagram socket that connects sends nothing
_NAME = "self-test"
_SIGSYS = getattr(signal, "SIGSYS", 31)


@dataclass(frozen=True)
class Outcome:
    """What the process reports."""

    lock: str  # NetworkLock.kind
    reason: str | None
    refused: bool  # whether a connection that it tried at the end was
    model: str | None
    tokens: int
    text: str


def without_network(bundle: Bundle | None, progress: Progress = silent) -> Iterator[Check]:
    """Runs the process on `bundle`, whose hashes it checks; without one it only loads ONNX Runtime."""
    name = bundle.manifest.name if bundle else "ONNX Runtime"
    task = f"Running {name} without network"
    progress(task, 0, 1, "models")
    command = [*COMMAND, *([str(bundle.folder)] if bundle else [])]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        text = f"{name} gave no answer within {PATIENCE_S:.0f} s"
        yield Check(_NAME, "problem", text, "Try a smaller model: pocketlm doctor --model NAME")
        return
    progress(task, 1, 1, "models")
    if ended.returncode == -_SIGSYS:
        yield Check(
            _NAME,
            "problem",
            f"something tried to open a connection while {name} ran, and was stopped",
            "Please report it, with the versions above.",
            {"attempts": True},
        )
    elif ended.returncode:
        last = (ended.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        yield Check(_NAME, "problem", f"{name} did not run (exit code {ended.returncode}): {last}")
    else:
        # Libraries may print too; the report comes last.
        yield judge(Outcome(**json.loads(ended.stdout.splitlines()[-1])))


def judge(outcome: Outcome) -> Check:
    """What the outcome proves."""
    facts: Mapping[str, Any] = {**vars(outcome), "attempts": False if outcome.lock == "kernel" else None}
    if not outcome.refused and outcome.lock != "none":
        text = f"the network was locked ({outcome.lock}), and a connection could be opened all the same"
        return Check(_NAME, "problem", text, "Please report it, with the versions above.", facts)
    did = (
        f"{outcome.model} answered with {outcome.tokens} tokens"
        if outcome.model
        else "no model is here to answer; ONNX Runtime was loaded"
    )
    if outcome.lock == "kernel":
        text = f"{did} while the kernel kept the network locked; nothing tried to use it"
        if outcome.model is None:
            remedy = "pocketlm pull smollm2-135m, for a test with a model"
            return Check(_NAME, "note", text, remedy, facts)
        return Check(_NAME, "ok", text, facts=facts)
    if outcome.lock == "python":
        text = (
            f"{did} while Python could open no connection. Native code is not covered: {outcome.reason}, so "
            "this proves nothing of ONNX Runtime itself"
        )
    else:
        text = f"{did}, but the network could not be locked: {outcome.reason}. This proves nothing"
    return Check(_NAME, "note", text, facts=facts)


def main(arguments: list[str]) -> None:
    """The process: prints its Outcome as JSON."""
    lock = lock_network(fatal=True)
    model, tokens, text = _answer(Path(arguments[0])) if arguments else _load()
    outcome = Outcome(lock.kind, lock.reason, _is_refused(lock), model, tokens, text)
    print(json.dumps(vars(outcome)), flush=True)  # noqa: T201


def _answer(folder: Path) -> tuple[str, int, str]:
    from pocketlm.bundle import open_bundle
    from pocketlm.engine import Model

    bundle = open_bundle(folder)
    context_length = min(_CONTEXT_LENGTH, bundle.manifest.dimensions.context_length)
    with Model(bundle, context_length=context_length, concurrency=1) as model:
        completion = model.generate(_PROMPT, max_tokens=TOKENS)
    return model.name, completion.usage.completion_tokens, completion.text


def _load() -> tuple[None, int, str]:
    import pocketlm.session  # noqa: F401

    return None, 0, ""


def _is_refused(lock: NetworkLock) -> bool:
    """Tries what the lock refuses without ending the process; no byte would leave if it did not."""
    try:
        if lock.kind == "kernel":
            with socket.socket(socket.AF_UNIX) as local:
                local.connect("\0pocketlm")  # abstract: nobody listens there, and no file's rights matter
        else:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
                datagrams.connect((_NOWHERE, 9))
    except PermissionError:
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
