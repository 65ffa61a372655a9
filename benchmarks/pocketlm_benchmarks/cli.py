"""`pocketlm bench`: how fast a model is on this device."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pocketlm_benchmarks.speed import SpeedReport


def register(app: typer.Typer) -> None:
    """Adds the command; called through the entry point group `pocketlm.commands`."""
    app.command(name="bench")(bench)


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for run.", show_default=False)],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of prompt, and depth of the deep decode.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate each time.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Repetitions behind one that warms up.")] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Threads. Default: the physical cores.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill, decode, load time and memory on this device."""
    from pocketlm.cli import console
    from pocketlm_benchmarks.speed import measure

    with console.progress() as progress:
        report = measure(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repetitions=repetitions,
            threads=threads,
            progress=progress,
        )
    if as_json:
        console.write_json(dataclasses.asdict(report))
    else:
        _print(report)


def _print(report: SpeedReport) -> None:
    from rich.table import Table

    from pocketlm.cli import console
    from pocketlm.files import readable_size

    divergence = "not measured" if report.kl_mean is None else f"{report.kl_mean:.4f} nats from fp32"
    console.write(
        f"{report.model} {report.precision}, {readable_size(report.bundle_bytes)}, KL {divergence}\n"
        f"{report.processor}, {console.count(report.threads, 'thread')}, "
        f"ONNX Runtime {report.onnxruntime}\n\n"
    )
    table = Table("", "median", "lowest", "highest", box=None, pad_edge=False)
    for name, rate in (
        (f"prefill {report.prompt_tokens} tokens, tok/s", report.prefill),
        (f"decode {report.new_tokens} tokens, empty context, tok/s", report.decode_empty),
        (f"decode {report.new_tokens} tokens behind {report.prompt_tokens}, tok/s", report.decode_deep),
    ):
        table.add_row(name, f"{rate.median:.1f}", f"{rate.lowest:.1f}", f"{rate.highest:.1f}")
    console.out().print(table)
    console.write(
        f"\nload {report.load_s:.2f} s, resident {readable_size(report.resident_bytes)}, "
        f"peak {readable_size(report.peak_resident_bytes)}\n"
    )
