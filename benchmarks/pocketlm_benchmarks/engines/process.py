"""An engine in a process of its own, as the harness sees it.

The process leads a group of its own: a key press that interrupts the harness does not reach the engine in
the middle of an answer, and whatever the engine started ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import psutil

from pocketlm import errors
from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineInfo,
    EngineMissingError,
    EngineSpec,
    Query,
    Trace,
)
from pocketlm_benchmarks.engines.registry import adapter_of

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 10.0
_STDERR_LINES = 200  # kept
_STDERR_LINES_SHOWN = 8
_STDERR_LINE_BYTES = 2000

_ENVIRONMENT = {
    # Nothing is fetched and nothing is reported while something is measured.
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUTF8": "1",
    # Without it the current folder hides packages of the same name.
    "PYTHONSAFEPATH": "1",
}
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


@dataclass(frozen=True)
class Answered:
    """What came back: the traces of all queries, repeat after repeat in the order of the queries."""

    traces: tuple[Trace, ...]
    walls_s: tuple[float, ...]  # of each repeat, from handing its queries over to the last answer

    @property
    def wall_s(self) -> float:
        return sum(self.walls_s)


class EngineProcess:
    """Starts the engine and loads its weights; ends with the block, or with `close()`.

    Raises EngineMissingError for an engine that is not installed or cannot do this, EngineError for one that
    fails, does not come up within `start_timeout_s`, or not back within `answer_timeout_s` for a repeat, and
    InvalidSettingError for a kind that is not known. Not for several threads.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        request = {"open": dataclasses.asdict(spec), "adapter": adapter_of(spec.kind)}
        self.spec = spec
        self._answer_timeout_s = answer_timeout_s
        self._busy = True  # asked and not yet answered
        self._process: subprocess.Popen[bytes] | None = _started(spec)
        self.pid: int = self._process.pid
        """Of the process that the engine's code runs in."""
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._readers = [
            _reader(self._process.stdout, self._replies.put),
            _reader(self._process.stderr, self._keep_stderr, limit=_STDERR_LINE_BYTES),
        ]
        try:
            opened = self._ask(request, start_timeout_s)
            self.info: EngineInfo = EngineInfo(**opened["info"])
            # In a virtual environment on Windows, what was started is a launcher of the interpreter.
            self.pid = opened["pid"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def answer(self, queries: Sequence[Query], *, repeat: int = 1) -> Answered:
        """Hands all queries over at once, `repeat` times one after the other.

        Raises EngineMissingError for a case that the engine cannot do, and EngineError. The process is gone
        after a crash or a time-out; after any other error it can be asked again.
        """
        request = {"queries": [dataclasses.asdict(query) for query in queries], "repeat": repeat}
        reply = self._ask({"answer": request}, self._answer_timeout_s * repeat)
        traces = (Trace(**{**fields, "gaps_s": tuple(fields["gaps_s"])}) for fields in reply["traces"])
        return Answered(tuple(traces), tuple(reply["walls_s"]))

    def stderr(self) -> str:
        """The last lines that the engine printed."""
        return "\n".join(self._stderr)

    def close(self) -> None:
        """Ends the process, by force if it is busy or does not go. Never raises; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        if not self._busy:
            with contextlib.suppress(OSError):
                _write(process, {"close": True})
                self._wait_for_end()
        _kill_group(process)
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        for reader in self._readers:
            reader.join(_CLOSE_TIMEOUT_S)

    def _ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._process is None:
            raise EngineError(f"{self.spec.kind} has ended. Start it again.")
        self._busy = True
        try:
            _write(self._process, request)
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise EngineError(
                f"{self.spec.kind} did not come back within {timeout_s:g} s and was ended.{self._said()}"
            ) from None
        except OSError:  # it no longer reads
            line = None
        if line is None:
            raise EngineError(f"{self.spec.kind} {self._death()}.{self._said()}")
        self._busy = False
        reply: dict[str, Any] = json.loads(line)
        if error := reply.get("error"):
            missing = error["kind"] == "missing"
            raise (EngineMissingError if missing else EngineError)(f"{self.spec.kind}: {error['message']}")
        return reply

    def _death(self) -> str:
        """Reaps the process, which ended by itself, and says how."""
        process = self._process
        self.close()
        code = None if process is None else process.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by the signal {signal.Signals(-code).name}"
        return f"ended by itself with exit code {code}"

    def _said(self) -> str:
        lines = [line for line in self._stderr if line][-_STDERR_LINES_SHOWN:]
        return " Its last lines:\n  " + "\n  ".join(lines) if lines else " It printed nothing."

    def _keep_stderr(self, line: bytes | None) -> None:
        if line is not None:
            self._stderr.append(line.decode("utf-8", errors="replace").rstrip())

    def _wait_for_end(self) -> None:
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        with contextlib.suppress(queue.Empty):
            # A line may still be under way where an answer was given up.
            while self._replies.get(timeout=max(0.0, deadline - time.monotonic())) is not None:
                pass


def _started(spec: EngineSpec) -> subprocess.Popen[bytes]:
    python = spec.python or sys.executable
    try:
        return subprocess.Popen(
            [python, "-c", _bootstrap(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(spec.threads),
            **_new_group(),
        )
    except OSError as error:
        raise EngineMissingError(f"{spec.kind} cannot be started with {python}: {error.strerror}.") from None


def _new_group() -> dict[str, Any]:
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _bootstrap(spec: EngineSpec) -> str:
    """The program of the worker.

    Under our own interpreter it sees the modules that we see. Under another, our folders are on the path only
    until the worker is imported: they may hold all that is installed here, for another Python.
    """
    run = "from pocketlm_benchmarks.engines.worker import main"
    if spec.python is None:
        return f"import sys; sys.path[:] = {sys.path!r}; {run}; main()"
    roots = {str(Path(errors.__file__).parents[1]), str(Path(__file__).parents[2])}
    return (
        f"import sys; path = sys.path[:]; sys.path[:0] = {sorted(roots)!r}; {run}; sys.path[:] = path; main()"
    )


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, **_ENVIRONMENT, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}


def _write(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    stdin: IO[bytes] = process.stdin  # type: ignore[assignment]  # it is a pipe
    stdin.write(json.dumps(request).encode("ascii") + b"\n")
    stdin.flush()


def _reader(
    stream: IO[bytes] | None, take: Callable[[bytes | None], None], limit: int = -1
) -> threading.Thread:
    """A thread that hands over each line of `stream` (in pieces of `limit` bytes) and None at its end."""

    def read() -> None:
        with stream:  # type: ignore[union-attr]  # it is a pipe
            for line in iter(lambda: stream.readline(limit), b""):  # type: ignore[union-attr]
                take(line)
        take(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the process and all that it started. It must not have been waited for: until
    then no other process can have its id."""
    if sys.platform == "win32":
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process.pid)
            for child in [*root.children(recursive=True), root]:
                with contextlib.suppress(psutil.Error):
                    child.kill()
    else:
        # PermissionError is how macOS says that only a zombie is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
