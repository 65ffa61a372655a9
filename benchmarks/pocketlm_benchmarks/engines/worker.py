"""The process that one engine runs in: `python -m pocketlm_benchmarks.engines.worker`.

Reads one JSON object a line on standard input and answers each with one on standard output:

    {"open": EngineSpec, "adapter": "module:Class"}   →  {"info": EngineInfo, "pid": its own}
    {"answer": {"queries": [Query], "repeat": 1}}     →  {"traces": [Trace], "walls_s": [of each repeat]}
    {"close": true}                                   →  nothing: the process ends

    or {"error": {"kind": "missing" | "failed", "message": …}}; the process stays, to be asked or closed.

It may run under another interpreter, whose environment has an engine's packages and not pocketlm's. So this
module imports the standard library, `pocketlm.errors` and the protocol, and besides only the adapter.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from pocketlm.errors import PocketlmError
from pocketlm_benchmarks.engines.protocol import Engine, EngineError, EngineMissingError, EngineSpec, Query

Reply = Callable[[Mapping[str, Any]], None]


def main() -> None:
    # OpenVINO's packages report to a web service unless this one is missing; no setting turns that off.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    serve(_requests(sys.stdin.buffer), _private_stdout())


def serve(requests: Iterable[bytes], reply: Reply) -> None:
    """Answers requests until one says close."""
    engine: Engine | None = None
    try:
        for line in requests:
            request = json.loads(line)
            if "close" in request:
                return
            try:
                if "open" in request:
                    engine = _open(request)
                    reply({"info": dataclasses.asdict(engine.info), "pid": os.getpid()})
                else:
                    reply(_answer(engine, **request["answer"]))
            except Exception as error:
                reply({"error": _described(error)})
    finally:
        if engine is not None:
            engine.close()


def _open(request: Mapping[str, Any]) -> Engine:
    module, _, name = request["adapter"].partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(EngineSpec(**request["open"]))
    return engine


def _answer(engine: Engine | None, queries: list[dict[str, Any]], repeat: int) -> dict[str, Any]:
    if engine is None:
        raise EngineError("the engine was asked before it was opened")
    asked = [_query(**fields) for fields in queries]
    traces, walls_s = [], []
    for _ in range(repeat):
        begun = time.perf_counter()
        answered = engine.answer(asked)
        walls_s.append(time.perf_counter() - begun)
        if len(answered) != len(asked):
            raise EngineError(f"{engine.info.name} answered {len(answered)} of {len(asked)} queries")
        traces += answered
    return {"traces": [dataclasses.asdict(trace) for trace in traces], "walls_s": walls_s}


def _query(prompt_ids: list[int], new_tokens: int, messages: list[Any]) -> Query:
    return Query(tuple(prompt_ids), new_tokens, tuple(messages))


def _described(error: Exception) -> dict[str, str]:
    if isinstance(error, PocketlmError):
        return {
            "kind": "missing" if isinstance(error, EngineMissingError) else "failed",
            "message": str(error),
        }
    traceback.print_exception(error)  # to standard error, for a person who looks closer
    return {"kind": "failed", "message": f"{type(error).__name__}: {error}"}


def _requests(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of `stream`, which are read ahead: if it ends without a close, the harness has gone, and the
    process ends with all that it started, in the middle of an answer too."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        if sys.platform != "win32" and os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def _private_stdout() -> Reply:
    """Takes standard output for the replies alone; what an engine prints goes to standard error."""
    private = os.dup(1)
    os.dup2(2, 1)

    def reply(message: Mapping[str, Any]) -> None:
        # ASCII, so that no locale matters. NaN is no JSON, and no measurement.
        rest = memoryview(json.dumps(message, allow_nan=False).encode("ascii") + b"\n")
        while rest:
            rest = rest[os.write(private, rest) :]

    return reply


if __name__ == "__main__":
    main()
