"""A small desktop chat window: `python desktop_chat.py [MODEL]`. Needs pocketlm and tkinter, nothing else.

Two parts: `Worker` loads the model and answers in a thread of its own, and never touches the window; `Window`
is tkinter, and never waits. Jobs go to the worker through a queue, and what happens comes back as events
through another, which the window empties a few times a second.

A folder `model` beside this file, a bundle, is the app's own model: see docs/embedding.md for how to freeze
both into one program.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
import tkinter as tk
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tkinter import font as tkfont
from tkinter import ttk
from typing import Any

import pocketlm
from pocketlm.hub import cached_bundles
from pocketlm_models import catalogue

OWN_MODEL = Path(__file__).parent / "model"
FIRST_MODEL = "smollm2-135m"
SETTINGS = pocketlm.Settings(
    temperature=0.6, top_p=0.95, repetition_penalty=1.05, max_tokens=1024, overflow="slide"
)

POLL_MS = 30
PATIENCE_S = 5.0
"""What a closed window waits for its worker, which ends within a step unless it is loading."""


# What the worker tells the window


@dataclass(frozen=True)
class Loading:
    task: str
    done: int
    total: int  # 0: not known
    unit: str


@dataclass(frozen=True)
class Loaded:
    name: str
    precision: str
    context_length: int  # tokens


@dataclass(frozen=True)
class Said:
    """A piece of the answer. `tokens_per_s` is that of all tokens behind the first, None for the first."""

    text: str
    tokens: int
    ttft_s: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class Answered:
    completion: pocketlm.Completion


@dataclass(frozen=True)
class Cleared:
    """A new conversation begins: nothing of the old one comes after this."""


@dataclass(frozen=True)
class Failed:
    message: str


Event = Loading | Loaded | Said | Answered | Cleared | Failed


class Worker:
    """Loads and answers, one job after the other, in one thread; its methods return at once."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._model: pocketlm.Model | None = None
        self._chat: pocketlm.Chat | None = None
        self._stream: pocketlm.Stream | None = None
        self._stopping = threading.Event()
        self._closing = threading.Event()
        # A daemon: one stuck in a slow download must not keep a closed program alive.
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def load(self, name: str) -> None:
        """Load this model in place of the one there is: Cleared, then Loaded or Failed."""
        self.stop()
        self._jobs.put(lambda: self._load(name))

    def ask(self, text: str) -> None:
        """Send the user's next message; ends in Answered or Failed."""
        self._stopping.clear()
        self._jobs.put(lambda: self._answer(text))

    def stop(self) -> None:
        """End the answer under way, which stays as far as it came."""
        self._stopping.set()
        if (stream := self._stream) is not None:
            stream.close()  # from this thread, while the worker's waits for the next piece

    def forget(self) -> None:
        """Begin a new conversation."""
        self.stop()
        self._jobs.put(self._forget)

    def close(self) -> None:
        """End what is under way and give the model's memory back."""
        self._closing.set()
        self.stop()
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Whether the worker has ended, after waiting this long at most."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # In the worker's thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closing.is_set():
            try:
                job()
            except _ClosingError:
                break
            except pocketlm.PocketlmError as error:
                self.events.put(Failed(str(error)))
            except Exception as error:  # a window has no console to show a traceback on
                self.events.put(Failed(f"{type(error).__name__}: {error}"))
        self._unload()

    def _load(self, name: str) -> None:
        self._unload()
        self.events.put(Cleared())
        model = self._model = pocketlm.load(name, progress=self._report)
        self._chat = model.chat()
        self.events.put(Loaded(model.name, model.manifest.precision.name, model.context_length))

    def _unload(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = self._chat = None

    def _forget(self) -> None:
        if self._chat is not None:
            self._chat.reset()
        self.events.put(Cleared())

    def _report(self, task: str, done: int, total: int, unit: str) -> None:
        if self._closing.is_set():
            raise _ClosingError
        self.events.put(Loading(task, done, total, unit))

    def _answer(self, text: str) -> None:
        if self._chat is None:
            raise pocketlm.PocketlmError("No model is loaded. Choose one first.")
        asked_s = first_s = time.perf_counter()
        tokens = 0
        with self._chat.stream(text, **SETTINGS) as stream:
            self._stream = stream
            if self._stopping.is_set():  # asked for before there was a stream to close
                stream.close()
            for piece in stream:
                now_s = time.perf_counter()
                tokens += 1
                if tokens == 1:
                    first_s = now_s
                rate = (tokens - 1) / (now_s - first_s) if tokens > 1 else None
                self.events.put(Said(piece.text, tokens, first_s - asked_s, rate))
        self._stream = None
        self.events.put(Answered(stream.completion))


class _ClosingError(Exception):
    """Ends a load whose window is gone."""


# What is shown of it


def model_names() -> list[str]:
    """What the picker offers: the catalogue, and what else is in the cache."""
    known = catalogue()
    defaults = {f"{name}-{entry.precision}" for name, entry in known.items()}
    cached = (bundle.folder.name for bundle in cached_bundles())
    return [*known, *(name for name in cached if name not in defaults)]


def progress_line(event: Loading) -> str:
    """`Downloading smollm2-135m: 45 of 98 MB`."""
    scale, unit = (1_000_000, "MB") if event.unit == "B" else (1, event.unit)
    of = f" of {event.total // scale:,}" if event.total else ""
    return f"{event.task}: {event.done // scale:,}{of} {unit}"


def speed_line(tokens: int, ttft_s: float, tokens_per_s: float | None) -> str:
    """`57.3 tokens/s · first token after 0.21 s · 85 tokens`."""
    rate = [f"{tokens_per_s:,.1f} tokens/s"] if tokens_per_s else []
    count = f"{tokens:,} token" + ("" if tokens == 1 else "s")
    return " · ".join([*rate, f"first token after {ttft_s:.2f} s", count])


def answer_line(completion: pocketlm.Completion, context_length: int) -> str:
    """The speed of a whole answer, why it ended early if it did, and how full the context is."""
    ends = {"length": ["cut at its longest"], "cancelled": ["stopped"], "timeout": ["out of time"]}
    line = speed_line(
        completion.usage.completion_tokens,
        completion.timings.ttft_s,
        completion.timings.decode_tokens_per_s,
    )
    used = f"context {completion.usage.total_tokens / context_length:.0%} full"
    dropped = ["the oldest messages are left out"] if completion.usage.dropped_messages else []
    return " · ".join([*ends.get(completion.finish_reason, []), line, used, *dropped])


PAPER, BAND, LINE = "#ffffff", "#f1f4f9", "#d9dfe8"
INK, FAINT, BLUE, DARK_BLUE, RED = "#1c2430", "#6b7686", "#2f5fd0", "#244ba8", "#b3261e"
FAMILIES = ("Segoe UI", "SF Pro Text", "Inter", "Cantarell", "Noto Sans")  # the first that is there

# fmt: off
# Of the theme clam, which looks the same everywhere and can be coloured throughout.
STYLES: dict[str, dict[str, Any]] = {
    ".": {"background": PAPER, "foreground": INK, "bordercolor": LINE,
          "lightcolor": PAPER, "darkcolor": PAPER},
    "TButton": {"padding": (14, 6), "focuscolor": LINE},
    "Go.TButton": {"background": BLUE, "foreground": PAPER, "bordercolor": BLUE,
                   "lightcolor": BLUE, "darkcolor": BLUE},
    "TCombobox": {"padding": 6, "arrowsize": 16, "arrowcolor": FAINT, "fieldbackground": PAPER},
    "Vertical.TScrollbar": {"gripcount": 0, "width": 10, "background": LINE, "troughcolor": PAPER,
                            "bordercolor": PAPER},
    "Horizontal.TProgressbar": {"background": BLUE, "troughcolor": BAND, "bordercolor": PAPER,
                                "thickness": 4},
    "Status.TLabel": {"background": BAND, "foreground": FAINT, "padding": (16, 6)},
    "Bad.Status.TLabel": {"foreground": RED},
}
STATES: dict[str, dict[str, Any]] = {
    "TButton": {"background": [("active", BAND)]},
    "Go.TButton": {"background": [("disabled", LINE), ("active", DARK_BLUE)],
                   "foreground": [("disabled", FAINT)], "bordercolor": [("disabled", LINE)],
                   "lightcolor": [("disabled", LINE)], "darkcolor": [("disabled", LINE)]},
    "Vertical.TScrollbar": {"background": [("active", FAINT)]},
}
MARGINS = {"lmargin1": 22, "lmargin2": 22, "rmargin": 22}
TAGS: dict[str, dict[str, Any]] = {
    "name": {"font": "TkHeadingFont", "spacing1": 12, "spacing3": 3, **MARGINS},
    "text": {"spacing2": 4, "spacing3": 4, **MARGINS},
    "hint": {"foreground": FAINT, "justify": "center", "spacing3": 6},
    "gap": {"font": ("TkDefaultFont", 4)},
    "you": {"background": BAND},
    "model": {"foreground": BLUE},
    "error": {"foreground": RED},
}
PLAIN: dict[str, Any] = {
    "wrap": "word", "font": "TkTextFont", "borderwidth": 0, "highlightthickness": 0,
    "background": PAPER, "foreground": INK, "insertbackground": INK, "selectbackground": "#cfe0ff",
}
# fmt: on


class Window:
    """The chat window; `name` is the model that is loaded at once."""

    def __init__(self, root: tk.Tk, name: str, names: list[str]) -> None:
        self.root = root
        self.worker = Worker()
        self._loaded: Loaded | None = None
        self._answering = self._closed = False
        self._style()
        self._build(name, names)
        self._load(name)
        self._poll()

    # Looks

    def _style(self) -> None:
        self.root.title("pocketlm")
        self.root.geometry("760x640")
        self.root.minsize(440, 360)
        self.root.configure(background=PAPER)
        there = tkfont.families()
        family = next((family for family in FAMILIES if family in there), None)
        for name in ("TkDefaultFont", "TkTextFont", "TkHeadingFont", "TkCaptionFont"):
            font = tkfont.nametofont(name)
            font.configure(family=family or font.actual("family"), size=11)
        tkfont.nametofont("TkHeadingFont").configure(size=10, weight="bold")
        tkfont.nametofont("TkCaptionFont").configure(size=10, weight="normal")
        style = ttk.Style(self.root)
        style.theme_use("clam")
        for name, options in STYLES.items():
            style.configure(name, **options)
        for name, options in STATES.items():
            style.map(name, **options)
        thumb: Any = ("Vertical.Scrollbar.thumb", {"expand": "1", "sticky": "nswe"})
        style.layout(  # without arrows
            "Vertical.TScrollbar", [("Vertical.Scrollbar.trough", {"sticky": "ns", "children": [thumb]})]
        )

    def _build(self, name: str, names: list[str]) -> None:
        self.root.columnconfigure(0, weight=1)
        self.root.rowconfigure(2, weight=1)
        self._build_top(name, names)
        self.bar = ttk.Progressbar(self.root)
        self._build_page()
        self._build_entry()
        self.status = ttk.Label(self.root, style="Status.TLabel", font="TkCaptionFont")
        self.status.grid(row=4, sticky="ew")
        self.root.bind("<Escape>", lambda _: self.worker.stop() if self._answering else None)
        self.root.protocol("WM_DELETE_WINDOW", self.close)

    def _build_top(self, name: str, names: list[str]) -> None:
        top = ttk.Frame(self.root, padding=(16, 12))
        top.grid(row=0, sticky="ew")
        top.columnconfigure(1, weight=1)
        picker = ttk.Combobox(top, values=names, width=28)
        picker.set(name)
        picker.bind("<<ComboboxSelected>>", lambda _: self._load(picker.get()))
        picker.bind("<Return>", lambda _: self._load(picker.get()))
        if names:
            picker.grid(row=0, column=0)
        ttk.Button(top, text="New chat", command=self.worker.forget).grid(row=0, column=2)

    def _build_page(self) -> None:
        frame = ttk.Frame(self.root)
        frame.grid(row=2, sticky="nsew")
        frame.columnconfigure(0, weight=1)
        frame.rowconfigure(0, weight=1)
        self.page = tk.Text(frame, PLAIN, state="disabled", cursor="arrow")
        self.page.grid(row=0, column=0, sticky="nsew")
        scroll = ttk.Scrollbar(frame, command=self.page.yview)
        scroll.grid(row=0, column=1, sticky="ns")

        def scrolled(first: float, last: float) -> None:
            scroll.set(first, last)
            (scroll.grid_remove if float(last) - float(first) >= 1 else scroll.grid)()

        self.page.configure(yscrollcommand=scrolled)
        for tag, options in TAGS.items():
            self.page.tag_configure(tag, **options)
        self.page.tag_raise("sel")

    def _build_entry(self) -> None:
        frame = ttk.Frame(self.root, padding=(16, 10, 16, 12))
        frame.grid(row=3, sticky="ew")
        frame.columnconfigure(0, weight=1)
        self.entry = tk.Text(frame, PLAIN, height=3, padx=10, pady=8, undo=True)
        self.entry.configure(highlightthickness=1, highlightbackground=LINE, highlightcolor=BLUE)
        self.entry.grid(row=0, column=0, sticky="ew")
        self.button = ttk.Button(frame, text="Send", width=7, style="Go.TButton", command=self._pressed)
        self.button.grid(row=0, column=1, padx=(10, 0), sticky="ns")
        for key in ("<Return>", "<KP_Enter>"):
            self.entry.bind(key, self._return)
        self.entry.bind("<Shift-Return>", lambda _: None)  # the more specific one: a new line, as usual
        self.entry.focus_set()

    # What the user does

    def send(self, text: str) -> None:
        if not text.strip() or self._answering or self._loaded is None:
            return
        self.entry.delete("1.0", "end")
        if not self._page_used():
            self._clear()
        self._write("You\n", "name", "you")
        self._write(f"{text.strip()}\n", "text", "you")
        self._write("\n", "gap", "you")
        self._write(f"{self._loaded.name}\n", "name", "model")
        self._set_answering(True)
        self._tell("Reading …")
        self.worker.ask(text.strip())

    def close(self) -> None:
        """Hides the window at once and goes when the worker has ended."""
        self._closed = True
        self.root.withdraw()
        self.worker.close()
        self._leave(time.monotonic() + PATIENCE_S)

    def _leave(self, until_s: float) -> None:
        if self.worker.join(0) or time.monotonic() > until_s:
            self.root.destroy()
        else:
            self.root.after(POLL_MS, self._leave, until_s)

    def _load(self, name: str) -> None:
        self._loaded = None
        self.button.state(["disabled"])
        self._tell(f"Loading {Path(name).name} …")
        self.bar.configure(mode="indeterminate", value=0)
        self.bar.grid(row=1, sticky="ew")
        self.bar.start(40)
        self.worker.load(name)
        self.entry.focus_set()

    def _pressed(self) -> None:
        if self._answering:
            self.worker.stop()
        else:
            self.send(self.entry.get("1.0", "end"))

    def _return(self, _: object) -> str:
        self.send(self.entry.get("1.0", "end"))
        return "break"

    # What the worker tells

    def _poll(self) -> None:
        if self._closed:
            return
        while not self.worker.events.empty():
            self._handle(self.worker.events.get())
        self.root.after(POLL_MS, self._poll)

    def _handle(self, event: Event) -> None:
        match event:
            case Loading():
                if event.total:
                    self.bar.stop()
                    self.bar.configure(mode="determinate", value=100 * event.done / event.total)
                self._tell(progress_line(event))
            case Loaded():
                self._loaded = event
                self._end_bar()
                self._greet(event)
            case Said():
                self._write(event.text, "text")
                self._tell(speed_line(event.tokens, event.ttft_s, event.tokens_per_s))
            case Answered():
                self._write("\n", "text")
                self._write("\n", "gap")
                self._set_answering(False)
                length = self._loaded.context_length if self._loaded else 1
                self._tell(answer_line(event.completion, length))
            case Cleared():
                self._clear()
                if self._loaded is not None:
                    self._greet(self._loaded)
            case Failed():
                self._end_bar()
                self._write(f"{event.message}\n", "text", "error")
                self._set_answering(False)
                self._tell("That did not work.", bad=True)

    def _greet(self, loaded: Loaded) -> None:
        self.button.state(["!disabled"])
        self._clear()
        self._write("\n" * 5)
        self._write(f"Ask {loaded.name} anything.\nWhat you write stays on this device.\n", "hint")
        self._tell(f"{loaded.name} · {loaded.precision} · {loaded.context_length:,} tokens of context")

    def _set_answering(self, answering: bool) -> None:
        self._answering = answering
        self.button.configure(text="Stop" if answering else "Send")

    def _end_bar(self) -> None:
        self.bar.stop()
        self.bar.grid_remove()

    def _tell(self, text: str, *, bad: bool = False) -> None:
        self.status.configure(text=text, style="Bad.Status.TLabel" if bad else "Status.TLabel")

    def _page_used(self) -> bool:
        return bool(self.page.tag_ranges("text"))

    def _clear(self) -> None:
        self.page.configure(state="normal")
        self.page.delete("1.0", "end")
        self.page.configure(state="disabled")

    def _write(self, text: str, *tags: str) -> None:
        at_end = self.page.yview()[1] > 0.99  # whoever has scrolled up reads on undisturbed
        self.page.configure(state="normal")
        self.page.insert("end", text, tags)
        self.page.configure(state="disabled")
        if at_end:
            self.page.see("end")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="A small desktop chat window.")
    parser.add_argument("model", nargs="?", help="a name of the catalogue, a bundle folder, hf:ORG/REPO")
    chosen: str | None = parser.parse_args(arguments).model
    own = OWN_MODEL.is_dir() and chosen is None
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.shcore.SetProcessDpiAwareness(1)  # sharp letters on screens with many pixels
    root = tk.Tk()
    Window(root, str(OWN_MODEL) if own else chosen or FIRST_MODEL, [] if own else model_names())
    root.mainloop()


if __name__ == "__main__":
    main(sys.argv[1:])
