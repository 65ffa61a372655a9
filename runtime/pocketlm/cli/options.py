"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_type_hints

import typer

from pocketlm.cli import console
from pocketlm.errors import did_you_mean
from pocketlm.manifest import Precision
from pocketlm.power import PowerMode

if TYPE_CHECKING:
    from pocketlm import Settings


def _check_precision(value: str | None) -> str | None:
    known = get_args(get_type_hints(Precision)["name"])
    if value is not None and value not in known:
        raise typer.BadParameter(
            f"{value!r} is not a precision; use {' or '.join(known)}.{did_you_mean(value, known)}"
        )
    return value


def _check_power(value: str | None) -> str | None:
    known = get_args(PowerMode)
    if value is not None and value not in known:
        raise typer.BadParameter(
            f"{value!r} is not a power mode; use {', '.join(known)}.{did_you_mean(value, known)}"
        )
    return value


def complete_model(incomplete: str) -> list[str]:
    """Names for the shell's completion: what is here and what the catalogue knows."""
    try:
        from pocketlm.cli.models import known_names

        return [name for name in known_names() if name.startswith(incomplete)]
    except Exception:  # whatever fails, pressing Tab must not fill the screen
        return []


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name from `pocketlm list --all`, hf:ORG/REPO, or the path of a bundle, a .gguf file or a "
        "checkpoint folder.",
        show_default=False,
        autocompletion=complete_model,
    ),
]
System = Annotated[
    str | None, typer.Option("--system", "-s", metavar="TEXT", help="A system message.", show_default=False)
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="End the answer after this many tokens (default: when the context is full).",
        show_default=False,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="End the answer before this text. Can be given several times.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show speeds on standard error.")]

Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        metavar="X",
        min=0.0,
        help="0 (the default) takes the likeliest token, 1 samples as trained.",
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0.0,
        max=1.0,
        help="Sample from the likeliest tokens that together reach this probability.",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Sample from this many likeliest tokens; 0 is off.",
        show_default=False,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0.0,
        max=1.0,
        help="Drop tokens below this share of the likeliest one's probability.",
        show_default=False,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0.0,
        help="Above 1 makes tokens that occurred before less likely.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="The same seed gives the same text.",
        show_default=False,
    ),
]

PrecisionName = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        callback=_check_precision,
        help="int8 (the default), int4 or fp32.",
        show_default=False,
    ),
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Tokens that prompt and answer may have together; memory grows with it.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="CPU threads (default: physical cores, or POCKETLM_THREADS).",
        show_default=False,
    ),
]


Power = Annotated[
    str | None,
    typer.Option(
        "--power",
        metavar="MODE",
        callback=_check_power,
        help="eco, balanced (the default) or fast: how many threads, and whether they spin.",
        show_default=False,
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        help="A smaller model with the same tokenizer, to draft what MODEL then verifies.",
        show_default=False,
    ),
]
NoSpeculation = Annotated[
    bool, typer.Option("--no-speculation", help="Compute one token at a time, without drafts.")
]
Reproducible = Annotated[
    bool,
    typer.Option(
        "--reproducible", help="The same seed gives the same text with and without speculation; slower."
    ),
]


def settings(**given: Any) -> Settings:
    """What the user has set: the rest is left to the engine's defaults."""
    settings = {name: value for name, value in given.items() if value is not None and value != []}
    idle = [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "min_p") if name in settings]
    if idle and not settings.get("temperature"):
        console.note(f"{', '.join(idle)}: no effect at temperature 0. Add, for example, --temperature 0.7.")
    return cast("Settings", settings)
