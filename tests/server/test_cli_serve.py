"""`pocketlm serve`: options, keys, what it says, and the whole of it once."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner, Result

from helpers.processes import ROOT
from pocketlm.cli import build_app
from pocketlm.cli import serve as command
from pocketlm.network_lock import NetworkLock
from pocketlm.server import access_log
from pocketlm.server.addresses import elsewhere_url
from pocketlm.server.config import DEFAULT_PORT, ModelOptions, ServerConfig

PATIENCE_S = 60.0


class Given:
    """What the command line has made of its options."""

    config: ServerConfig
    models: ModelOptions
    rest: dict[str, Any]
    level: str

    def run(self, config: ServerConfig, models: ModelOptions, **rest: Any) -> None:
        self.config, self.models, self.rest = config, models, rest

    def configure_logging(self, level: str) -> None:
        self.level = level


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    given = Given()
    for name in [name for name in os.environ if name.startswith("POCKETLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(command, "run", given.run)
    monkeypatch.setattr(access_log, "configure_logging", given.configure_logging)
    return given


def serve(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(build_app(), ["serve", *arguments])
    assert result.exit_code == code, result.stderr
    return result


def test_without_options_the_defaults_hold(given: Given) -> None:
    assert serve().stderr == ""
    assert given.config == ServerConfig()
    assert given.models == ModelOptions()
    assert given.rest == {"locks": True, "as_json": False, "open_page": False}
    assert given.level == "info"


OPTIONS: dict[str, tuple[str, Any]] = {
    "--host": ("localhost", "localhost"),
    "--port": ("0", 0),
    "--max-body": ("2MiB", 2 << 20),
    "--max-connections": ("7", 7),
    "--max-tokens": ("99", 99),
    "--answer-timeout": ("1m30s", 90.0),
    "--allowed-host": ("models.lan", ("models.lan",)),
    "--allowed-origin": ("https://a.example", ("https://a.example",)),
    "--api-key": ("sk", ("sk",)),
}
MODEL_OPTIONS: dict[str, tuple[str, Any]] = {
    "--queue-limit": ("0", 0),
    "--concurrency": ("3", 3),
    "--cache-memory": ("1GB", 10**9),
    "--memory-budget": ("2GiB", 2 << 30),
    "--keep-alive": ("-1", -1.0),
    "--context-length": ("512", 512),
    "--threads": ("2", 2),
    "--power": ("eco", "eco"),
    "--precision": ("int4", "int4"),
    "--draft": ("small", "small"),
}
FIELDS = {
    "--max-body": "max_body_bytes",
    "--answer-timeout": "answer_timeout_s",
    "--api-key": "api_keys",
    "--allowed-host": "allowed_hosts",
    "--allowed-origin": "allowed_origins",
    "--cache-memory": "cache_bytes",
    "--memory-budget": "budget_bytes",
    "--keep-alive": "keep_alive_s",
}


@pytest.mark.parametrize("option", [*OPTIONS, *MODEL_OPTIONS])
@pytest.mark.parametrize("where", ["argument", "environment"])
def test_each_option_arrives(option: str, where: str, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = {**OPTIONS, **MODEL_OPTIONS}[option]
    if where == "argument":
        serve("model", option, text)
    else:
        monkeypatch.setenv("POCKETLM_" + option[2:].replace("-", "_").upper(), text)
        serve("model")
    holder = given.config if option in OPTIONS else given.models
    assert getattr(holder, FIELDS.get(option, option[2:].replace("-", "_"))) == value
    assert given.models.names == ("model",)


def test_flags(given: Given) -> None:
    serve("a", "b", "--reproducible", "--log-prompts", "--no-network-lock", "--json", "--open")
    assert given.models == ModelOptions(names=("a", "b"), reproducible=True)
    assert given.config == ServerConfig(log_prompts=True)
    assert given.rest == {"locks": False, "as_json": True, "open_page": True}


def test_an_answer_may_take_for_ever(given: Given) -> None:
    serve("--answer-timeout", "0")
    assert given.config.answer_timeout_s is None


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--max-body", "8 apples"], 2, "8MB or 2GiB"),
        (["--keep-alive", "soon"], 2, "1h30m"),
        (["--port", "70000"], 2, "65535"),
        (["--log-level", "inf"], 2, "Did you mean info"),
        (["--draft", "small"], 2, "one MODEL"),
        (["a", "b", "--draft", "small"], 2, "one MODEL"),
        (["--host", "0.0.0.0"], 1, "--api-key-file FILE or set POCKETLM_API_KEY"),
        (["--max-body", "0"], 1, "max_body_bytes"),
        (["--allowed-origin", "*"], 1, "scheme and host"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], code: int, told: str, given: Given) -> None:
    assert told in " ".join(serve(*arguments, code=code).stderr.split())
    assert not hasattr(given, "config")


def test_a_key_on_the_command_line_is_seen_by_others(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "processes" in serve("--api-key", "sk-secret").stderr
    monkeypatch.setenv("POCKETLM_API_KEY", "sk-secret")
    assert serve("--host", "0.0.0.0").stderr == ""
    assert given.config.api_keys == ("sk-secret",)
    assert "sk-secret" not in serve("--help").stdout


def test_keys_from_a_file(given: Given, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\n one \n\nzweité\n", encoding="utf-8")
    keys.chmod(0o600)
    assert serve("--api-key-file", str(keys)).stderr == ""
    assert given.config.api_keys == ("one", "zweité")
    if os.name == "posix":
        keys.chmod(0o644)
        assert "chmod 600" in serve("--api-key-file", str(keys)).stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "cannot be read"), (b"\xff", "cannot be read"), (b"# none\n\n", "has no key")],
)
def test_a_file_without_keys(content: bytes | None, told: str, given: Given, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    assert told in serve("--api-key-file", str(tmp_path / "keys"), code=1).stderr
    assert not hasattr(given, "config")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "pocketlm[serve]"' in serve(code=1).stderr


URL = "http://127.0.0.1:8642"


@pytest.mark.parametrize(
    ("config", "lock", "told"),
    [
        ({}, None, {"API key": "not needed", "Network": "not locked, as --no-network-lock says"}),
        ({"api_keys": ("k",)}, NetworkLock("kernel", None), {"API key": "needed", "Network": "locked by"}),
        (
            {"api_keys": ("k",), "host": "0.0.0.0"},
            NetworkLock("kernel", None, ("TCP a to b",)),
            {"API key": "needed: other machines can connect to 0.0.0.0", "Network": "locked by"},
        ),
        ({}, NetworkLock("python", "no seccomp"), {"Network": "locked for Python alone: no seccomp"}),
        ({}, NetworkLock("none", "no hook"), {"Network": "not locked: no hook"}),
    ],
)
def test_what_a_person_is_told(
    config: dict[str, Any], lock: NetworkLock | None, told: dict[str, str]
) -> None:
    summary = command.summary(URL, ["a", "b"], ServerConfig(**config), lock)
    assert summary["Chat page"] == f"{URL}/"
    assert summary["Models"] == "a, b"
    assert "Elsewhere" not in summary
    assert all(len(f"Chat page  {text}") <= 80 for name, text in summary.items() if name != "Network")
    for name, text in told.items():
        assert summary[name].startswith(text)
    if lock is not None:
        assert ("TCP a to b" in summary["Network"]) == bool(lock.left_open)
        assert (
            command.as_object(URL, ["a"], ServerConfig(**config), lock)["network_lock"]["kind"] == lock.kind
        )


def test_other_devices_are_told_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(text: str, family: int = socket.AF_INET) -> Any:
        return SimpleNamespace(family=family, address=text)

    found = {
        "lo": [address("127.0.0.1")],
        "down": [address("192.0.2.1")],
        "gone": [address("192.0.2.2")],
        "eth0": [address("fe80::1", socket.AF_INET6), address("169.254.0.1"), address("192.0.2.3")],
    }
    states = {name: SimpleNamespace(isup=name != "down") for name in ("lo", "down", "eth0")}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    everywhere = ServerConfig(host="0.0.0.0", api_keys=("k",))
    assert elsewhere_url(ServerConfig(), URL) is None
    assert elsewhere_url(ServerConfig(host="192.0.2.3", api_keys=("k",)), URL) is None
    assert elsewhere_url(everywhere, URL) == "http://192.0.2.3:8642"
    named = dataclasses.replace(everywhere, allowed_hosts=("*.lan", "models.lan"))
    assert elsewhere_url(named, URL) == "http://models.lan:8642"
    assert command.summary(URL, [], everywhere, None, "http://a:1")["Elsewhere"].startswith("http://a:1/ ")
    del found["eth0"]
    assert elsewhere_url(everywhere, URL) is None


def test_no_address_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise PermissionError(1, "not allowed")

    monkeypatch.setattr(psutil, "net_if_addrs", fail)
    assert elsewhere_url(ServerConfig(host="::", api_keys=("k",)), URL) is None


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command in a process of its own, and the line of JSON that it prints when it is ready."""
    with started("-m", "pocketlm", "serve", "--port", "0", "--json", *arguments) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, json.loads(line) if line else {}


@contextmanager
def started(*arguments: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    paths = [str(ROOT / folder) for folder in ("models", "runtime")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POCKETLM_")}
    with subprocess.Popen(
        [sys.executable, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_serves_and_ends(int8_bundle: Path) -> None:
    with serving(str(int8_bundle), "--threads", "1") as (process, ready):
        assert ready["models"] == ["tiny"]
        assert ready["pid"] == process.pid
        assert ready["network_lock"]["kind"] in ("kernel", "python")
        assert ready["network_lock"]["left_open"] == []
        question = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 4}
        answer = httpx.post(f"{ready['url']}/v1/chat/completions", json=question, timeout=PATIENCE_S)
        assert answer.json()["usage"]["completion_tokens"] <= 4
        assert httpx.get(f"{ready['url']}/health").json() == {"status": "ok"}
        assert httpx.get(ready["url"], headers={"Host": "evil.example"}).status_code == 403
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
    assert out == ""
    assert "POST /v1/chat/completions 200" in err
    assert "\x1b" not in err
    assert "secret" not in err
    assert "Traceback" not in err


def test_a_model_that_cannot_be_had_ends_it(tmp_path: Path) -> None:
    with serving(str(tmp_path / "nothing.gguf")) as (process, ready):
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
    assert ready == {}
    assert "Check the path" in err
    assert "Listening" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope"], "no model 'nope'"),
        (["smollm2-135m", "nope"], "no model 'nope'"),
        (["smollm2-135m:int5"], "of 'smollm2-135m:int5' is 'int5', expected fp32 or int8 or"),
        (["smollm2-135m", "--draft", "nope"], "no model 'nope'"),
        ([], "in the cache to serve"),
    ],
)
def test_names_are_checked_before_it_listens(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = CliRunner().invoke(
            build_app(), ["serve", "--port", str(other.getsockname()[1]), *arguments], terminal_width=200
        )
    assert result.exit_code != 0
    assert told in result.stderr
    assert "in use" not in result.stderr


SLOW_START = """
import signal, sys, time
from pocketlm.cli import main
from pocketlm.server import launch

def make_app(config, options, progress):
    try:
        while True:
            progress("Converting", 1, 2, "layers")
            print("busy", flush=True)
            time.sleep(float(sys.argv.pop()) if len(sys.argv) > 3 else 0.02)
    finally:
        print("cleaned up", flush=True)

launch.check_models = lambda options: None
launch.make_app = make_app
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_broken_off(number: signal.Signals) -> None:
    with started("-c", SLOW_START, "serve", "--port=0") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "busy\n"
        told = process.stderr.readline()
        url = re.search(r"http://[^ ]+", told)
        assert url is not None
        page = httpx.get(url[0], headers={"Accept": "text/html"})
        assert (page.status_code, "Converting: 50 % …" in page.text) == (503, True)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 128 + number
    assert out.splitlines()[-1] == "cleaned up"
    assert err.splitlines()[-1] == "Stopped before the server was ready."


@pytest.mark.skipif(os.name != "posix", reason="there are no pseudo-terminals")
def test_a_start_that_is_stuck_leaves_the_cursor() -> None:
    """The second Ctrl-C does not wait for a step that reports nothing."""
    ours, theirs = os.openpty()
    try:
        with started("-c", SLOW_START, "serve", "--port=0", "600", stderr=theirs) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130
        said = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "\x1b[?25l" in said
    assert "\x1b[?25h" in said[said.rindex("\x1b[?25l") :]
    assert "Stopped before the server was ready." in said


def test_the_default_port_is_in_the_help() -> None:
    assert str(DEFAULT_PORT) in serve("--help").stdout
