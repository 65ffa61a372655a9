"""`pocketlm tune`: measure what is best for a model on this device, and keep it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketlm.cli import console, options
from pocketlm.threads import THREADS_VARIABLE

if TYPE_CHECKING:
    from pocketlm.bundle import Bundle
    from pocketlm.tuning import Tuning

SEVERAL_ROWS = 8  # what speculation and several conversations at once share a pass for


def tune(
    model: options.Model,
    *,
    precision: options.PrecisionName = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Measure again, and keep the result even if the device was busy."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the fastest threads and chunks for a model on this device.

    Takes a minute at most for a small model, once; the result is used whenever the model is loaded. Close
    what else is at work meanwhile. Answers come faster or slower by it, and are no better or worse.
    """
    from pocketlm import hub, tuning
    from pocketlm.bundle import open_bundle

    with console.progress() as progress:
        folder = hub.find_bundle(model, precision=precision, progress=progress)
        bundle = open_bundle(folder, verify=False)
        known = None if force else tuning.find_tuning(bundle.manifest)
        found = known or tuning.tune(bundle, context_length=_capacity(bundle), progress=progress)
        kept = known is not None or force or not found.disturbed
        if known is None and kept:
            tuning.save(found, bundle.manifest)
    if as_json:
        console.write_json(as_object(bundle, found, kept=kept))
    else:
        print_tuning(bundle, found)
    if known is not None:
        console.note(f"Measured before, at {found.measured_at}. Measure again with --force.")
    if found.disturbed:
        console.note(
            f"Other programs were at work: one thread got {found.core_share:.0%} of a core. "
            + ("" if kept else "So this is not kept. Close them and try again, or keep it with --force.")
        )
    if os.environ.get(THREADS_VARIABLE):
        console.note(f"{THREADS_VARIABLE} is set, so its number of threads is used and not this one.")


def as_object(bundle: Bundle, tuning: Tuning, *, kept: bool) -> dict[str, Any]:
    """A tuning as `--json` prints it."""
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "precision": manifest.precision.name,
        "folder": str(bundle.folder),
        "kept": kept,
        "tuning": dataclasses.asdict(tuning),
    }


def print_tuning(bundle: Bundle, tuning: Tuning) -> None:
    """What was tried and what won, on standard output."""
    manifest, device = bundle.manifest, tuning.device
    console.write(
        f"{manifest.name} ({manifest.precision.name}) on {device.processor}, "
        f"{console.count(device.cores, 'core')}, ONNX Runtime {tuning.onnxruntime}\n\n"
    )
    _print_table(
        ("THREADS", "SPIN", "PREFILL", "DECODE", "CPU TIME"),
        (
            (
                str(trial.threads),
                f"{trial.spin_us} µs" if trial.spin_us else "none",
                f"{1 / trial.prefill_s:,.0f} tok/s",
                f"{1 / trial.decode_s:,.1f} tok/s",
                f"{1000 * trial.decode_cpu_s:,.1f} ms/tok",
            )
            for trial in tuning.thread_trials
        ),
    )
    console.write("\n")
    _print_table(
        ("CHUNK", "PREFILL"),
        ((str(trial.chunk), f"{1 / trial.prefill_s:,.0f} tok/s") for trial in tuning.chunk_trials),
    )
    cost = tuning.row_costs.ratio(SEVERAL_ROWS, 0)
    console.write(
        f"\nBest: {console.count(tuning.threads, 'thread')}, in eco {tuning.eco_threads}; prompts in chunks "
        f"of {tuning.prefill_chunk} tokens. A pass over {SEVERAL_ROWS} tokens takes as long as "
        f"{cost:.1f} over one.\n"
    )


def _print_table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.out().print(table)


def _capacity(bundle: Bundle) -> int:
    """The context that a model has unless it is loaded with another."""
    from pocketlm.engine import DEFAULT_CONTEXT_LENGTH

    return min(DEFAULT_CONTEXT_LENGTH, bundle.manifest.dimensions.context_length)
