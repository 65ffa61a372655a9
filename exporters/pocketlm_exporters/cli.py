"""`pocketlm export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the command; called through the entry point group `pocketlm.commands`."""
    app.command(name="export")(export)


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A name of the catalogue, hf:ORG/REPO[@REVISION], a .gguf file or a checkpoint folder.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.", show_default=False)],
    precision: Annotated[str, typer.Option(help="int8, int4 or fp32.")] = "int8",
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="The quality gate: how far the mean next-token distribution may diverge from fp32, in nats. "
            "Default: 0.02 for int8, 0.1 for int4.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="Bytes of int8 weights: signed (best with VNNI and on ARM), unsigned (best on x86-64 "
            "without VNNI) or auto, as this machine likes them. Both run everywhere, with the same results."
        ),
    ] = "auto",
    ngrams: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            min=0,
            help="Let the finished model generate so many tokens, for a table that answers are drafted from. "
            "20,000 take minutes and make chat a few percent faster.",
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the bundle's manifest as JSON.")] = False,
) -> None:
    """Turn a trained model into a bundle and measure what that cost."""
    from pocketlm.cli import console
    from pocketlm.hub import fetch_source
    from pocketlm_exporters.export import export as run_export
    from pocketlm_exporters.processor import WEIGHT_BYTES, WeightBytes, weight_bytes

    choices: dict[str, WeightBytes] = {"auto": weight_bytes()}
    choices.update({name: name for name in WEIGHT_BYTES})
    if weights not in choices:
        raise typer.BadParameter(f"{weights!r} is not one of {', '.join(choices)}.", param_hint="--weights")
    with console.progress() as progress:
        files = fetch_source(source, progress=progress)
        manifest = run_export(
            files,
            output,
            precision=precision,
            max_kl=max_kl,
            weights=choices[weights],
            ngrams=ngrams,
            progress=progress,
        )
    if as_json:
        console.write(manifest.to_json())
        return
    quality = manifest.quality
    console.write(f"{output}: {manifest.name}, {manifest.precision.name}, {manifest.bytes / 1e6:.0f} MB\n")
    if quality is not None:
        console.write(
            f"perplexity {quality.perplexity:.2f} (fp32 {quality.perplexity_fp32:.2f}), "
            f"KL {quality.kl_mean:.4f} mean and {quality.kl_p99:.3f} at the 99th percentile, "
            f"top-1 agreement {quality.top1_agreement:.1%}, on {quality.tokens:,} tokens of {quality.text}\n"
        )
