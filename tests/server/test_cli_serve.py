"""`pocketlm serve`: options, keys, what it says, and the whole of it once."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from helpers.processes import ROOT
from pocketlm.cli import build_app
from pocketlm.cli import serve as command
from pocketlm.network_lock import NetworkLock
from pocketlm.server import access_log
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
    for name, text in told.items():
        assert summary[name].startswith(text)
    if lock is not None:
        assert ("TCP a to b" in summary["Network"]) == bool(lock.left_open)
        assert (
            command.as_object(URL, ["a"], ServerConfig(**config), lock)["network_lock"]["kind"] == lock.kind
        )


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command in a process of its own, and the line of JSON that it prints when it is ready."""
    paths = [str(ROOT / folder) for folder in ("models", "runtime")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POCKETLM_")}
    with subprocess.Popen(
        [sys.executable, "-m", "pocketlm", "serve", "--port", "0", "--json", *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield process, json.loads(line) if line else {}
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
    assert "Traceback" not in err


def test_the_default_port_is_in_the_help() -> None:
    assert str(DEFAULT_PORT) in serve("--help").stdout
