"""A model answers in a process without network: for real, and as such a process may end."""

from __future__ import annotations

import errno
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.doctor import cached_bundle, empty_home
from pocketlm.bundle import open_bundle
from pocketlm.doctor import self_test
from pocketlm.doctor.self_test import Outcome, judge, without_network
from pocketlm.network_lock import CALLS, NetworkLock

kernel_only = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in CALLS, reason="the kernel keeps no lock here"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


@kernel_only
def test_a_model_answers_without_network(int8_bundle: Path) -> None:
    tiny = open_bundle(int8_bundle, verify=False)
    (check,) = without_network(tiny)
    assert check.state == "ok", check.text
    assert check.facts["lock"] == "kernel"
    assert (check.facts["refused"], check.facts["attempts"]) == (True, False)
    assert check.facts["model"] == tiny.manifest.name
    assert 1 <= check.facts["tokens"] <= self_test.TOKENS


@kernel_only
def test_an_attempt_is_found(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process, with something in it that phones home."""
    script = (
        "import socket, sys, threading\n"
        "from pocketlm.doctor import self_test\n"
        "def answer(folder):\n"
        "    thread = threading.Thread(target=socket.socket)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "    return 'spy', 1, ''\n"
        "self_test._answer = answer\n"
        "self_test.main(sys.argv[1:])"
    )
    monkeypatch.setattr(self_test, "COMMAND", (sys.executable, "-c", script))
    (check,) = without_network(open_bundle(int8_bundle, verify=False))
    assert (check.state, check.facts) == ("problem", {"attempts": True})
    assert "tried to open a connection" in check.text


def test_without_a_model_the_runtime_is_loaded() -> None:
    (check,) = without_network(None)
    assert check.state == "note"
    assert check.text.startswith("no model is here to answer; ONNX Runtime was loaded")
    assert (check.facts["model"], check.facts["refused"]) == (None, True)


def test_nothing_that_computes_is_loaded_before_the_lock() -> None:
    script = (
        "import sys, pocketlm.doctor.self_test\n"
        "heavy = {'numpy', 'onnxruntime', 'tokenizers', 'huggingface_hub'}\n"
        "raise SystemExit(','.join(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""


def test_a_bundle_that_does_not_run(home: Path) -> None:
    damaged = cached_bundle(home)
    (damaged.folder / "model.onnx").write_bytes(b"fakes")
    (check,) = without_network(damaged)
    assert check.state == "problem"
    assert "tiny did not run (exit code 1): pocketlm.errors.BundleError" in check.text
    assert "model.onnx is altered" in check.text


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(returncode: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        ended = subprocess.CompletedProcess(("x",), returncode, stdout, stderr)
        monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: ended)

    return pretend


def test_how_a_process_may_end(process: Callable[..., None]) -> None:
    process(-getattr(signal, "SIGSYS", 31))
    assert next(without_network(None)).facts == {"attempts": True}
    process(-9)
    assert "(exit code -9): no message" in next(without_network(None)).text
    outcome = Outcome("kernel", None, True, "tiny", 8, "Hello")
    process(0, b"noise of a library\n" + json.dumps(vars(outcome)).encode())
    assert next(without_network(None)) == judge(outcome)


def test_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: Any, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired("x", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    check = next(without_network(None))
    assert (check.state, "no answer within 300 s" in check.text) == ("problem", True)


@pytest.mark.parametrize(
    ("lock", "refused", "model", "state", "text"),
    [
        (
            "kernel",
            True,
            "tiny",
            "ok",
            "tiny answered with 8 tokens while the kernel kept the network locked",
        ),
        ("kernel", False, "tiny", "problem", "a connection could be opened all the same"),
        (
            "python",
            True,
            "tiny",
            "note",
            "Native code is not covered: a reason, so this proves nothing of ONNX",
        ),
        ("python", False, "tiny", "problem", "a connection could be opened all the same"),
        ("none", False, "tiny", "note", "the network could not be locked: a reason. This proves nothing"),
        ("kernel", True, None, "note", "no model is here to answer; ONNX Runtime was loaded while"),
    ],
)
def test_what_an_outcome_proves(lock: str, refused: bool, model: str | None, state: str, text: str) -> None:
    check = judge(Outcome(lock, "a reason", refused, model, 8, "Hello"))
    assert check.state == state
    assert text in check.text
    assert check.facts["attempts"] is (False if lock == "kernel" else None)


@pytest.mark.parametrize("kind", ["kernel", "python"])
@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EACCES, True), (errno.ECONNREFUSED, False), (0, False)]
)
def test_trying_a_connection(kind: Any, number: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Socket:
        def __init__(self, *arguments: object) -> None: ...

        def __enter__(self) -> Socket:
            return self

        def __exit__(self, *error: object) -> None: ...

        def connect(self, address: object) -> None:
            if number:
                raise OSError(number, "refused")

    monkeypatch.setattr(self_test.socket, "socket", Socket)
    monkeypatch.setattr(self_test.socket, "AF_UNIX", 1, raising=False)
    assert self_test._is_refused(NetworkLock(kind, None)) is refused
