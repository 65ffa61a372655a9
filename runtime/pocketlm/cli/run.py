"""`pocketlm run`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketlm.cli import console, options
from pocketlm.errors import PromptError

if TYPE_CHECKING:
    from pocketlm import Completion, Model, Stream
    from pocketlm.energy import Reading, Window


def run(
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The prompt. Text on standard input follows it, or is the prompt if this is - or left out.",
            show_default=False,
        ),
    ] = None,
    *,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the model's chat template.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object: model, text, finish_reason, usage, timings (in seconds), energy.",
        ),
    ] = False,
    verbose: options.Verbose = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema",
            metavar="SCHEMA",
            help="Answer with JSON that this schema allows: the schema itself, or @FILE.",
            show_default=False,
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            "--regex", metavar="PATTERN", help="Answer with text that matches this.", show_default=False
        ),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option(
            "--grammar",
            metavar="LARK",
            help="Answer by this Lark grammar: the grammar itself, or @FILE.",
            show_default=False,
        ),
    ] = None,
    precision: options.PrecisionName = None,
    context_length: options.ContextLength = None,
    threads: options.Threads = None,
    power: options.Power = None,
    draft: options.DraftModel = None,
    no_speculation: options.NoSpeculation = False,
    reproducible: options.Reproducible = False,
) -> None:
    """Answer one prompt.

    A model that is not here yet is fetched and converted first.
    """
    if raw and system is not None:
        raise typer.BadParameter("--raw leaves out the chat template, which a system message needs.")
    text = read_prompt(prompt, raw=raw)
    settings = options.settings(
        max_tokens=max_tokens,
        stop=stop,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        speculate=False if no_speculation else None,
        json_schema=_inline_or_file(json_schema),
        regex=regex,
        grammar=_inline_or_file(grammar),
    )

    with load(
        model,
        precision=precision,
        context_length=context_length,
        threads=threads,
        power=power,
        draft=draft,
        reproducible=reproducible,
    ) as loaded:
        window = begin_energy() if as_json else None
        stream = loaded.stream(text, system=system, raw=raw, **settings)
        with closing(stream):
            completion = _collect(stream) if as_json else print_answer(stream)
        if window is not None:
            console.write_json(as_object(loaded, completion, window.end()))
        else:
            note_cut(loaded, completion, max_tokens)
        if verbose:
            console.note(summary(completion, loaded.load_s))


def _inline_or_file(text: str | None) -> str | None:
    """The content of FILE for @FILE. Raises a usage error if it cannot be read."""
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{text[1:]} cannot be read: {error}.") from None


def load(name: str, **given: Any) -> Model:
    """The model, with progress shown while it is fetched and converted. What is None is left to `load`."""
    import pocketlm

    with console.progress() as progress:
        return pocketlm.load(
            name,
            **{option: value for option, value in given.items() if value is not None},
            progress=progress,
        )


def read_prompt(argument: str | None, *, raw: bool) -> str:
    """The prompt from the argument and standard input: the argument first, a blank line between them.

    Newlines at the end of standard input are what `echo` and editors add; they are dropped unless `raw`.
    Raises PromptError where standard input is not UTF-8 and a usage error where there is no prompt at all.
    """
    if argument is not None and any("\ud800" <= char <= "\udfff" for char in argument):
        raise PromptError(
            "the prompt is not valid text in this terminal's encoding. Pipe it in as UTF-8 instead."
        )
    piped = _read_stdin(argument)
    if not raw:
        piped = piped.rstrip("\r\n")
    if argument is None or argument == "-":
        if not piped:
            raise typer.BadParameter(
                "there is no prompt. Give one as an argument or on standard input, "
                "or start a conversation with: pocketlm chat MODEL",
                param_hint="PROMPT",
            )
        return piped
    return f"{argument}\n\n{piped}" if piped else argument


def _read_stdin(argument: str | None) -> str:
    """What is piped in; a terminal is read only where the user asks for it with `-`."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    if sys.stdin.isatty():
        if argument != "-":
            return ""
        console.note("Type the prompt, then Ctrl-D on a line of its own.")
    try:
        # Bytes, so that neither the platform's encoding nor its newlines change the prompt.
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"standard input is not UTF-8 text: byte 0x{error.object[error.start]:02x} at position "
            f"{error.start:,}. Convert it first, for example with: iconv -f latin1 -t utf-8"
        ) from None


def print_answer(stream: Stream) -> Completion:
    """Print the pieces of an answer as they come, and a newline after the last."""
    last = ""
    try:
        for piece in stream:
            console.write(piece.text)
            last = piece.text or last
    except KeyboardInterrupt:
        raise typer.Exit(console.EXIT_INTERRUPTED) from None
    finally:
        # An error's message and the shell's prompt start on a line of their own.
        if last and not last.endswith("\n"):
            console.write("\n")
    return stream.completion


def _collect(stream: Stream) -> Completion:
    for _ in stream:
        pass
    return stream.completion


def begin_energy() -> Window:
    """A window of this machine's best source of energy figures, most often an estimate."""
    from pocketlm.energy import find_probe

    return find_probe().probe.begin()


def as_object(model: Model, completion: Completion, reading: Reading) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "model": model.name,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            **dataclasses.asdict(completion.usage),
            "total_tokens": completion.usage.total_tokens,
        },
        "timings": {"load_s": model.load_s, **dataclasses.asdict(completion.timings)},
        "energy": reading.as_object(),
    }


def note_cut(model: Model, completion: Completion, max_tokens: int | None) -> None:
    """Say why an answer ended where the model did not end it itself."""
    if completion.finish_reason == "length":
        if max_tokens is not None and completion.usage.completion_tokens >= max_tokens:
            console.note(f"[cut off after {console.count(max_tokens, 'token')}, as --max-tokens says]")
        else:
            console.note(f"[cut off: the context of {model.context_length:,} tokens is full]")
    elif not completion.text and completion.finish_reason == "stop":
        console.note("[the model gave an empty answer]")


def summary(completion: Completion, load_s: float | None = None) -> str:
    """Tokens and speeds of one answer in a line."""
    usage, timings = completion.usage, completion.timings
    cached = f", {usage.cached_tokens:,} of them cached" if usage.cached_tokens else ""
    parts = [
        f"prompt {console.count(usage.prompt_tokens, 'token')}{cached}{_rate(timings.prefill_tokens_per_s)}",
        f"answer {console.count(usage.completion_tokens, 'token')}{_rate(timings.decode_tokens_per_s)}",
        f"first token after {timings.ttft_s:.2f} s",
        f"total {timings.total_s:.2f} s",
    ]
    if timings.drafted_tokens:
        parts.insert(2, f"drafts {timings.accepted_tokens:,} of {timings.drafted_tokens:,} right")
    if load_s is not None:
        parts.append(f"load {load_s:.2f} s")
    return " · ".join(parts)


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f" at {tokens_per_s:,.0f} tok/s"
