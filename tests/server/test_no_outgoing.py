"""A real `pocketlm serve` tries no connection: all of its APIs are driven under a lock that ends the process
at the first attempt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.processes import ROOT
from pocketlm import network_lock
from pocketlm.server import page

PATIENCE_S = 60.0

FATAL_SERVE = """
import functools
from pocketlm import network_lock
network_lock.lock_network = functools.partial(network_lock.lock_network, fatal=True)
from pocketlm.cli import main
main()
"""

ATTEMPT = """
from pocketlm.network_lock import lock_network
assert lock_network(fatal=True).kind == "kernel"
import socket
socket.socket()
"""

MESSAGES = [{"role": "user", "content": "Hello"}]
SHORT = {"max_tokens": 4}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, **SHORT},
    "/v1/completions": {"prompt": "Hello", **SHORT},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 16},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES, **SHORT},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": MESSAGES},
    "/v1/embeddings": {"input": ["one", "two"]},
    "/api/chat": {"model": "tiny", "messages": MESSAGES, "stream": False, "options": {"num_predict": 4}},
    "/api/generate": {"model": "tiny", "prompt": "Hello", "stream": False, "options": {"num_predict": 4}},
    "/api/embed": {"model": "tiny", "input": "one"},
    "/api/show": {"model": "tiny"},
    "/tokenize": {"content": "Hello"},
    "/detokenize": {"tokens": [70, 71]},
    "/apply-template": {"messages": MESSAGES},
}
READ = ["/health", "/metrics", "/props", "/v1/models", "/api/tags", "/api/ps", "/api/version", *page.PATHS]


def kernel_lock() -> str | None:
    """Why the kernel cannot lock a process here, found out in one of its own."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "from pocketlm import network_lock as n; print(n.lock_network().reason or '')",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.strip() or None


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT / folder) for folder in ("models", "runtime")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("POCKETLM_")}
    return {**own, "PYTHONPATH": os.pathsep.join(paths), **more}


@pytest.fixture(scope="module", autouse=True)
def needs_the_kernels_lock() -> None:
    if sys.platform != "linux" or network_lock.CALLS.get(os.uname().machine) is None:
        pytest.skip("the kernel's lock is for Linux on x86-64 and aarch64")
    if reason := kernel_lock():
        pytest.skip(f"the kernel's lock does not hold here: {reason}")


@contextmanager
def serving(bundle: Path, home: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command under the fatal lock, and the line of JSON that it prints when it is ready."""
    with subprocess.Popen(
        [sys.executable, "-c", FATAL_SERVE, "serve", str(bundle), "--port", "0", "--json", "--threads", "1"],
        env=environment(POCKETLM_HOME=str(home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_the_lock_ends_a_process_that_tries() -> None:
    """Otherwise the next test would prove nothing."""
    ended = subprocess.run([sys.executable, "-c", ATTEMPT], env=environment(), check=False)
    assert ended.returncode < 0


def test_nothing_is_tried_whatever_is_asked(int8_bundle: Path, tmp_path: Path) -> None:
    with (
        serving(int8_bundle, tmp_path) as (process, ready),
        httpx.Client(base_url=ready["url"], timeout=PATIENCE_S, verify=False) as client,
    ):
        assert ready["network_lock"] == {"kind": "kernel", "reason": None, "left_open": []}
        wrong = {path: answer for path in READ if (answer := client.get(path)).status_code != 200}
        for path, body in ASKED.items():
            if (answer := client.post(path, json=body)).status_code != 200:
                wrong[path] = answer
        assert {path: answer.text for path, answer in wrong.items()} == {}
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat"):
            streamed = client.post(path, json={**ASKED[path], "stream": True})
            assert streamed.status_code == 200
            assert len(streamed.text.splitlines()) > 1
        for schema in ({"$ref": "http://192.0.2.1/schema"}, {"type": "object"}):
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {**ASKED["/v1/chat/completions"], "response_format": form}
            client.post("/v1/chat/completions", json=body)
        assert client.post("/api/pull", json={"model": "nobody/nothing"}).status_code >= 400
        assert client.post("/v1/chat/completions", json={"model": "nobody/nothing"}).status_code == 400
        assert client.get("/health").status_code == 200
        assert process.poll() is None, f"it tried, and ended with {process.returncode}"
