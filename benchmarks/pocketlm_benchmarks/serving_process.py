"""A server as a process: ours, started from a bundle, or any that listens on this machine; what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from pocketlm_benchmarks.engines.protocol import EngineError
from pocketlm_benchmarks.memory import own_bytes
from pocketlm_benchmarks.serving_client import Client

END_S = 60.0


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    name: str
    client: Client
    pid: int | None  # None: on another machine, or another user's

    @property
    def cpu_s(self) -> float | None:
        """Seconds of processors' time that its process has taken so far."""
        try:
            times = None if self.pid is None else psutil.Process(self.pid).cpu_times()
        except psutil.Error:
            return None
        return None if times is None else times.user + times.system

    @property
    def own_bytes(self) -> int | None:
        """Its memory without the weights that it maps, where the system tells that apart."""
        if self.pid is None:
            return None
        try:
            return own_bytes(self.pid)
        except psutil.Error:
            return None


@contextmanager
def served(name: str, where: str, options: Sequence[str] = ()) -> Iterator[Served]:
    """The server at a URL, or `pocketlm serve WHERE` with `options`, which ends with the block.

    Raises EngineError if it does not start.
    """
    if where.startswith(("http://", "https://")):
        client = Client(where)
        yield Served(name, client, listening_pid(client.port))
        return
    command = [sys.executable, "-m", "pocketlm", "serve", where, "--port", "0", "--json"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*command, "--log-level", "error", *options], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                process.wait(END_S)
                log.seek(0)
                raise EngineError(f"pocketlm serve {where} did not start: {log.read().strip()[-500:]}")
            ready = json.loads(line)
            yield Served(name, Client(ready["url"]), ready["pid"])
            process.terminate()
            process.wait(END_S)
        finally:
            process.kill()


def listening_pid(port: int) -> int | None:
    """The process of this user that listens on `port`."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    found = [
        each.pid for each in connections if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    ]
    return found[0] if found else None
