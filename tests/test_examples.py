"""The desktop chat of examples/: its worker without a window, and the window where a display can be had."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tkinter", reason="the desktop chat needs tkinter")

import pocketlm
from helpers.tiny import letters, only, tiny_bundle, tiny_checkpoint
from pocketlm.generate import Timings, Usage
from pocketlm.sources import SourceFiles

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "desktop_chat.py"
LETTERS = pocketlm.Settings(logit_bias=only(letters()), temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("desktop_chat", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["desktop_chat"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["desktop_chat"]


@pytest.fixture
def worker(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its answers have 8 letters."""
    monkeypatch.setattr(example, "SETTINGS", pocketlm.Settings(**LETTERS, max_tokens=8))
    worker = example.Worker()
    yield worker
    worker.close()
    assert worker.join(20)


def until(worker: Any, *kinds: type) -> list[Any]:
    """The worker's events up to the first one of these kinds."""
    events = []
    while not events or not isinstance(events[-1], kinds):
        events.append(worker.events.get(timeout=20))
    return events


class TestWorker:
    def test_loads_and_answers(self, example: ModuleType, worker: Any, int8_bundle: Path) -> None:
        worker.load(str(int8_bundle))
        assert until(worker, example.Loaded, example.Failed) == [
            example.Cleared(),
            example.Loaded("tiny", "int8", 512),
        ]
        worker.ask("ONE")
        *said, answered = until(worker, example.Answered, example.Failed)
        completion = answered.completion
        assert "".join(event.text for event in said) == completion.text
        assert [event.tokens for event in said] == list(range(1, 9))
        assert [event.tokens_per_s is None for event in said] == [True] + 7 * [False]
        assert completion.finish_reason == "length"
        with pocketlm.load(int8_bundle, threads=1) as model:
            assert completion.text == model.generate("ONE", **example.SETTINGS).text

    def test_remembers_until_it_forgets(self, example: ModuleType, worker: Any, int8_bundle: Path) -> None:
        def prompt_tokens() -> int:
            worker.ask("ONE")
            tokens: int = until(worker, example.Answered)[-1].completion.usage.prompt_tokens
            return tokens

        worker.load(str(int8_bundle))
        first, second = prompt_tokens(), prompt_tokens()
        assert second > first
        worker.forget()
        assert until(worker, example.Cleared) == [example.Cleared()]
        assert prompt_tokens() == first

    @pytest.mark.parametrize("action", ["stop", "forget", "close"])
    def test_an_answer_can_be_ended(
        self,
        example: ModuleType,
        worker: Any,
        int8_bundle: Path,
        monkeypatch: pytest.MonkeyPatch,
        action: str,
    ) -> None:
        monkeypatch.setattr(example, "SETTINGS", LETTERS)  # until the context is full
        worker.load(str(int8_bundle))
        worker.ask("ONE")
        until(worker, example.Said)
        getattr(worker, action)()
        completion = until(worker, example.Answered)[-1].completion
        assert completion.finish_reason == "cancelled"
        if action == "close":
            assert worker.join(20)
        else:
            worker.ask("TWO")
            assert until(worker, example.Answered)[-1].completion.finish_reason == "length"

    def test_a_stop_before_the_answer_begins(
        self, example: ModuleType, worker: Any, int8_bundle: Path
    ) -> None:
        worker.load(str(int8_bundle))
        worker.ask("ONE")  # waits for the model
        worker.stop()
        assert until(worker, example.Answered)[-1].completion.finish_reason == "cancelled"

    def test_errors_are_told_and_the_worker_goes_on(
        self, example: ModuleType, worker: Any, int8_bundle: Path
    ) -> None:
        worker.ask("ONE")
        assert "No model is loaded" in until(worker, example.Failed)[-1].message
        worker.load("nosuch")
        assert "no model 'nosuch'" in until(worker, example.Failed)[-1].message
        worker.load(str(int8_bundle))
        worker.ask("A" * 2000)
        assert "the context holds 512" in until(worker, example.Failed)[-1].message
        worker.ask("ONE")
        assert until(worker, example.Answered, example.Failed)[-1].completion.finish_reason == "length"

    def test_an_error_that_nobody_expected(
        self, example: ModuleType, worker: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: object, **__: object) -> None:
            raise KeyError("oh")

        monkeypatch.setattr(pocketlm, "load", load)
        worker.load("tiny")
        assert until(worker, example.Failed)[-1].message == "KeyError: 'oh'"

    def test_tells_how_far_a_conversion_is(
        self,
        example: ModuleType,
        worker: Any,
        tiny_source: SourceFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("POCKETLM_HOME", str(tmp_path))
        worker.load(str(tiny_source.path))
        cleared, *loading, loaded = until(worker, example.Loaded, example.Failed)
        assert cleared == example.Cleared()
        assert isinstance(loaded, example.Loaded)
        assert loading
        assert all(isinstance(event, example.Loading) for event in loading)

    def test_closing_ends_a_download(
        self, example: ModuleType, worker: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(_: str, *, progress: Callable[..., None]) -> None:
            for done in range(100_000):
                progress("Downloading tiny", done, 100_000, "B")
                time.sleep(0.001)
            raise AssertionError("it was never told to end")

        monkeypatch.setattr(pocketlm, "load", load)
        worker.load("tiny")
        until(worker, example.Loading)
        worker.close()
        assert worker.join(20)
        while not worker.events.empty():
            assert isinstance(worker.events.get(), example.Loading)


class TestLines:
    def test_progress(self, example: ModuleType) -> None:
        loading = example.Loading("Downloading x", 45_900_000, 98_362_432, "B")
        assert example.progress_line(loading) == "Downloading x: 45 of 98 MB"
        assert (
            example.progress_line(example.Loading("Converting x", 3, 0, "layers")) == "Converting x: 3 layers"
        )

    def test_speed(self, example: ModuleType) -> None:
        assert example.speed_line(1, 0.214, None) == "first token after 0.21 s · 1 token"
        assert (
            example.speed_line(1234, 1.0, 57.26) == "57.3 tokens/s · first token after 1.00 s · 1,234 tokens"
        )

    @pytest.mark.parametrize(
        ("reason", "beginning"),
        [("stop", "9.0 tokens/s"), ("length", "cut at its longest · 9.0"), ("cancelled", "stopped · 9.0")],
    )
    def test_an_answer(self, example: ModuleType, reason: Any, beginning: str) -> None:
        timings = Timings(
            queue_s=0.0,
            prefill_s=0.1,
            decode_s=1.0,
            ttft_s=0.2,
            total_s=1.2,
            prefill_tokens_per_s=200.0,
            decode_tokens_per_s=9.0,
        )
        completion = pocketlm.Completion("", (5,) * 10, reason, Usage(40, 0, 10), timings)
        line = example.answer_line(completion, 200)
        assert line.startswith(beginning)
        assert line.endswith("first token after 0.20 s · 10 tokens · context 25% full")

    def test_the_names_to_pick_from(
        self, example: ModuleType, int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("POCKETLM_HOME", str(tmp_path))
        known = example.model_names()
        assert example.FIRST_MODEL in known
        for name in (f"{example.FIRST_MODEL}-int8", f"{example.FIRST_MODEL}-fp32"):
            shutil.copytree(int8_bundle, tmp_path / "bundles" / name)
        assert example.model_names() == [*known, f"{example.FIRST_MODEL}-fp32"]


# Runs the window through a conversation, closes it within an answer and prints what it showed.
DRIVER = """
import json, sys, time, tkinter as tk
import pocketlm
import desktop_chat
from helpers.tiny import letters, only

long = pocketlm.Settings(logit_bias=only(letters()), temperature=1.0, seed=4)
desktop_chat.SETTINGS = pocketlm.Settings(**long, max_tokens=8)
# Answers that are far from their end when they are stopped, however slow the window is drawn.
read = pocketlm.Stream.__next__
pocketlm.Stream.__next__ = lambda stream: time.sleep(0.003) or read(stream)
root = tk.Tk()
window = desktop_chat.Window(root, sys.argv[1], [])
shown = {}

def steps():
    yield lambda: window._loaded and root.focus_get() is window.entry  # or the keys go nowhere
    newline = window.worker._model.tokenizer.encode("\\n")  # Tk is slow with lines of thousands of letters
    long["logit_bias"] = only([*letters(), *newline])
    shown["greeting"] = window.page.get("1.0", "end")
    window.entry.insert("1.0", "ONE")
    window.entry.event_generate("<Shift-Return>")
    shown["two lines"] = window.entry.get("1.0", "end-1c")
    window.entry.event_generate("<Return>")
    yield lambda: not window._answering
    shown["first"] = window.page.get("1.0", "end")
    shown["status"] = window.status["text"]
    desktop_chat.SETTINGS = pocketlm.Settings(temperature=-1.0)
    window.send("TWO")
    yield lambda: not window._answering
    shown["error"] = window.page.get("1.0", "end")
    desktop_chat.SETTINGS = long
    for stop in (window.button.invoke, lambda: root.event_generate("<Escape>")):
        window.send("TWO")
        shown["button"] = window.button["text"]
        yield lambda: "tokens/s" in window.status["text"]
        stop()
        yield lambda: not window._answering
        shown.setdefault("stopped", []).append(window.status["text"])
    window.worker.forget()
    yield lambda: not window._page_used()
    window.send("THREE")
    yield lambda: "tokens/s" in window.status["text"]
    window.close()

def go_on(ready, rest):
    if not ready():
        root.after(5, go_on, ready, rest)
    elif (following := next(rest, None)) is not None:
        go_on(following, rest)

def fail(*error):
    sys.excepthook(*error)
    root.destroy()

root.report_callback_exception = fail
root.after(100_000, root.destroy)
root.after(100, window.entry.focus_force)
go_on(lambda: True, steps())
root.mainloop()
shown["ended"] = window.worker.join(0)
print(json.dumps(shown))
"""


@pytest.fixture
def display() -> Iterator[str]:
    """The display there is, or else a virtual one."""
    if sys.platform != "linux" or "DISPLAY" in os.environ:
        yield os.environ.get("DISPLAY", "")
        return
    if (server := shutil.which("Xvfb")) is None:
        pytest.skip("there is no display, and no Xvfb to make one")
    reader, writer = os.pipe()
    command = [server, "-displayfd", str(writer), "-screen", "0", "900x760x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL) as process:
        os.close(writer)
        try:
            with os.fdopen(reader, encoding="ascii") as stream:
                number = stream.readline().strip()
            yield f":{number}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()


def test_the_window(display: str, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, "fp32", checkpoint=tiny_checkpoint(max_position_embeddings=8192))
    paths = [ROOT / "examples", ROOT / "tests", *(ROOT / name for name in ("models", "runtime", "exporters"))]
    environment = {"DISPLAY": display, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(bundle)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert "Ask tiny anything." in shown["greeting"]
    assert shown["two lines"] == "ONE\n"
    assert shown["first"].startswith("You\nONE\n\ntiny\n")
    assert "8 tokens" in shown["status"]
    assert "temperature is -1.0" in shown["error"]
    assert shown["button"] == "Stop"
    assert all(line.startswith("stopped · ") for line in shown["stopped"])
    assert shown["ended"] is True
