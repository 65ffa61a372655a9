"""An engine in a process of its own: what comes back, and that nothing of it outlives a fault."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from helpers import fake_bench_engine
from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.engines import process
from pocketlm_benchmarks.engines.process import Answered, EngineProcess
from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineInfo,
    EngineMissingError,
    EngineSpec,
    Message,
    Query,
    Trace,
)
from pocketlm_benchmarks.engines.registry import ADAPTERS, Adapter

QUERY = Query((1, 2, 3), 3, (Message(role="user", content="Grüße\n"),))


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "fake", Adapter(fake_bench_engine.ADAPTER, "path", "a fault"))


def spec(fault: str = "sound", python: str | None = None) -> EngineSpec:
    return EngineSpec("fake", fault, threads=2, context_length=64, python=python)


def started(fault: str = "sound", *, timeout_s: float = 30.0) -> EngineProcess:
    return EngineProcess(spec(fault), start_timeout_s=30.0, answer_timeout_s=timeout_s)


def test_answers() -> None:
    with started() as engine:
        assert engine.info == EngineInfo("fake", "1.0", "none", 42, 0.5, False, note="2 threads")
        assert engine.pid != os.getpid()
        assert psutil.Process(engine.pid).is_running()
        answered = engine.answer([QUERY, Query((4,), 1)], repeat=2)
    text = "[1, 2, 3] [{'role': 'user', 'content': 'Grüße\\n'}]"
    first = Trace(3, 0, 3, 0.125, 0.5, 2, (0.25, 0.25), text)
    second = Trace(1, 0, 1, 0.125, 0.0, 0, (), "[4] []")
    assert answered.traces == (first, second) * 2
    assert len(answered.walls_s) == 2
    assert answered.wall_s == sum(answered.walls_s) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_behind_a_launcher_the_process_is_the_interpreters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a virtual environment's interpreter on Windows is one."""
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(Path(fake_bench_engine.__file__).parents[1]))
    with EngineProcess(spec(python=str(launcher))) as engine:
        assert psutil.Process(engine.pid).parent().cmdline()[1] == str(launcher)
        assert len(engine.answer([QUERY]).traces) == 1
    assert not psutil.pid_exists(engine.pid)


def test_wall_time_is_the_sum_of_the_repeats() -> None:
    assert Answered((), (1.0, 2.5)).wall_s == 3.5


def test_ends_with_the_block() -> None:
    with started() as engine:
        pass
    assert not psutil.pid_exists(engine.pid)
    engine.close()  # once more does nothing
    with pytest.raises(EngineError, match=r"fake has ended\. Start it again"):
        engine.answer([QUERY])


def test_what_an_engine_prints_does_not_disturb_the_replies() -> None:
    with started("prints") as engine:
        assert len(engine.answer([QUERY]).traces) == 1
    assert "a native library that prints" in engine.stderr()
    assert "and Python that does" in engine.stderr()


def test_a_missing_engine() -> None:
    with pytest.raises(EngineMissingError, match="fake: fake is not installed"):
        started("not installed")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("cannot", EngineMissingError, "fake: fake runs no such case"),
        ("fails", EngineError, "fake: out of luck"),
        ("has a bug", EngineError, "fake: KeyError: 'bug'"),
        ("gives NaN", EngineError, "fake: ValueError: Out of range float"),
        ("drops one", EngineError, "fake: fake answered 0 of 1 queries"),
    ],
)
def test_an_error_leaves_the_process_to_be_asked_again(
    fault: str, error: type[EngineError], message: str
) -> None:
    with started(fault) as engine:
        for _ in range(2):
            with pytest.raises(error, match=message) as caught:
                engine.answer([QUERY])
            assert caught.type is error


def test_a_death_at_the_start() -> None:
    with pytest.raises(EngineError, match=r"fake ended by itself with exit code 7\. It printed nothing\."):
        started("dies at the start")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_crash_names_its_signal_and_the_last_lines() -> None:
    with started("aborts") as engine:
        with pytest.raises(
            EngineError,
            match=r"(?s)fake was ended by the signal SIGABRT\. .*\n  GGML_ASSERT\(false\) failed$",
        ):
            engine.answer([QUERY])
        assert not psutil.pid_exists(engine.pid)


def test_a_killed_process_is_noticed_before_it_is_asked() -> None:
    with started() as engine:
        psutil.Process(engine.pid).kill()
        with pytest.raises(EngineError, match=r"fake (was ended by the signal SIGKILL|ended by itself)"):
            engine.answer([QUERY])


def test_a_start_that_takes_too_long() -> None:
    with pytest.raises(EngineError, match="fake did not come back within 1 s and was ended"):
        EngineProcess(spec("never starts"), start_timeout_s=1.0)


def test_an_answer_that_takes_too_long_ends_the_whole_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHILD_FILE", str(tmp_path / "child"))
    with started("hangs", timeout_s=0.5) as engine:
        with pytest.raises(EngineError, match=r"fake did not come back within 0\.5 s"):
            engine.answer([QUERY])
        assert not psutil.pid_exists(engine.pid)
    assert is_gone(tmp_path / "child")


def test_the_time_limit_counts_for_each_repeat() -> None:
    with started("sleeps", timeout_s=0.25) as engine, pytest.raises(EngineError, match=r"within 0\.5 s"):
        engine.answer([QUERY], repeat=2)


def test_a_child_that_an_engine_leaves_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CHILD_FILE", str(tmp_path / "child"))
    with started("leaves a child"):
        pass
    assert is_gone(tmp_path / "child")


def test_an_engine_that_does_not_close_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_CLOSE_TIMEOUT_S", 0.5)
    with started("never closes") as engine:
        pass
    assert not psutil.pid_exists(engine.pid)


def test_an_interrupted_answer_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def get(self, timeout: float) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), started("sleeps") as engine:
        monkeypatch.setattr(engine, "_replies", Interrupted())
        engine.answer([QUERY])
    assert not psutil.pid_exists(engine.pid)


def is_gone(file: Path) -> bool:
    """Whether the process whose id stands in `file` has ended (its new parent may not have reaped it)."""
    try:
        return psutil.Process(int(file.read_text())).wait(timeout=10) is None
    except psutil.NoSuchProcess:
        return True


def test_another_interpreter_imports_only_the_worker_from_our_folders(tmp_path: Path) -> None:
    """It sees our two packages, and none of what is installed beside them."""
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -c "$(cat {probe})" "$2"\n')
    wrapper.chmod(0o755)
    if sys.platform == "win32":
        pytest.skip("a shell script stands in for the interpreter")
    with pytest.raises(EngineError, match=r"(?s)path restored; loaded none"):
        EngineProcess(spec(python=str(wrapper)))


PROBE = """
import sys
before = list(sys.path)
program = sys.argv[1].replace('; main()', '')
exec(program)
heavy = {'numpy', 'onnxruntime', 'psutil', 'pydantic', 'tokenizers', 'typer'} & set(sys.modules)
restored = 'restored' if sys.path == before else 'changed'
sys.exit(f'path {restored}; loaded {heavy or None}'.replace('None', 'none'))
"""


def test_a_kind_that_is_not_known_starts_nothing() -> None:
    with pytest.raises(InvalidSettingError, match=r"'fakee' is no engine\. Did you mean fake"):
        EngineProcess(EngineSpec("fakee", "sound", threads=1, context_length=1))


def test_an_interpreter_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(EngineMissingError, match=r"fake cannot be started with .*nowhere: No such file"):
        EngineProcess(spec(python=str(tmp_path / "nowhere")))


def test_environment() -> None:
    environment = process._environment(3)
    assert environment["OMP_NUM_THREADS"] == environment["OPENBLAS_NUM_THREADS"] == "3"
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "ORT_DISABLE_TELEMETRY",
    ):
        assert environment[name] == "1"
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_the_engine_ends_with_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a harness that was killed: its end of the pipe closes in the middle of an answer."""
    monkeypatch.setenv("FAKE_CHILD_FILE", str(tmp_path / "child"))
    with process._started(spec("hangs")) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        opening = {"open": dataclasses.asdict(spec("hangs")), "adapter": fake_bench_engine.ADAPTER}
        process._write(running, opening)
        assert b"info" in running.stdout.readline()
        process._write(running, {"answer": {"queries": [], "repeat": 1}})
        running.stdin.close()
        assert running.wait(timeout=30) == -signal.SIGKILL
    assert is_gone(tmp_path / "child")
