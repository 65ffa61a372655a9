"""Models as tables and sections on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pocketlm.bundle import Bundle
from pocketlm.cli import console
from pocketlm.files import readable_size
from pocketlm.manifest import Manifest, Source
from pocketlm_models import CatalogueEntry, HubSource, PackageSource, PartsSource

NONE = "–"


def print_bundles(bundles: Iterable[tuple[str, Bundle]]) -> None:
    """One line a bundle, under the name to type for it."""
    table = _table("NAME", "PRECISION", "SIZE", "KL", "TOP-1", "LICENCE", "SOURCE")
    for name, bundle in bundles:
        manifest = bundle.manifest
        quality = manifest.quality
        _add_row(
            table,
            name,
            manifest.precision.name,
            readable_size(manifest.bytes),
            f"{quality.kl_mean:.4f}" if quality else NONE,
            f"{quality.top1_agreement:.1%}" if quality else NONE,
            manifest.licence or "unknown",
            _short_source(manifest.source),
        )
    console.out().print(table)


def print_entries(entries: Iterable[CatalogueEntry]) -> None:
    """One line a model of the catalogue."""
    console.out().print("\nIn the catalogue, not here yet (pocketlm pull NAME fetches one):", style="bold")
    table = _table("NAME", "LICENCE", "SOURCE", "WHAT IT IS")
    for entry in entries:
        _add_row(table, entry.name, entry.licence, _where(entry.source), entry.description)
    console.out().print(table)


def print_entry(entry: CatalogueEntry) -> None:
    """All that the catalogue knows of a model that is not here."""
    source = entry.source
    download = (
        "not known"
        if isinstance(source, HubSource)
        else readable_size(sum(package.wheel_bytes for package in source.packages))
    )
    _print_sections(
        entry.name,
        {
            "Catalogue": {
                "What it is": entry.description,
                "Licence": entry.licence,
                "Source": _where(source),
                "Download": download,
                "Precision": f"{entry.precision} unless another is asked for",
            }
        },
    )


def print_details(bundles: Iterable[Bundle]) -> None:
    """All that the bundles' manifests say, but for their layers and hashes."""
    for i, bundle in enumerate(bundles):
        if i:
            console.write("\n")
        _print_details(bundle.manifest, bundle.folder)


def _print_details(manifest: Manifest, folder: Path) -> None:
    size = manifest.dimensions
    ends = " and ".join(map(str, manifest.tokens.eos)) or "none"
    sections = {
        "Model": {
            "Family": manifest.family,
            "Shape": f"{size.layers} layers, width {size.hidden}, {size.heads} heads "
            f"({size.kv_heads} for keys and values)",
            "Vocabulary": f"{size.vocabulary:,} tokens; end of text: {ends}",
            "Context": f"{size.context_length:,} tokens",
            "Licence": manifest.licence or "unknown",
        },
        "Bundle": {
            "Precision": f"{manifest.precision.name}: {manifest.precision.recipe}",
            "Size": readable_size(manifest.bytes),
            "Folder": str(folder),
            "Made by": manifest.exporter,
        },
        "Quality": _quality(manifest),
        "Source": {
            "From": _source(manifest.source),
            "Weights": manifest.source.format,
            "SHA-256": manifest.source.sha256,
        },
    }
    _print_sections(manifest.name, sections)


def _quality(manifest: Manifest) -> dict[str, str]:
    quality = manifest.quality
    if quality is None:
        return {"Measured": "not measured"}
    rows = {
        "KL to fp32": f"{quality.kl_mean:.4f} nats per token (99th percentile: {quality.kl_p99:.3f})",
        "Same top token": f"{quality.top1_agreement:.1%} of positions",
        "Perplexity": f"{quality.perplexity:.3f} (fp32: {quality.perplexity_fp32:.3f})",
        "Measured on": f"{quality.text}, {quality.tokens:,} tokens",
    }
    if manifest.calibration is not None:
        calibration = manifest.calibration
        smoothing = "" if calibration.smoothing is None else f", smoothing {calibration.smoothing:g}"
        rows["Calibrated on"] = f"{calibration.text}, {calibration.tokens:,} tokens{smoothing}"
    return rows


def _source(source: Source) -> str:
    # A commit is known by its first digits; a version or a tag is short anyway.
    return source.location + (f" @ {source.revision[:12]}" if source.revision else "")


def _short_source(source: Source) -> str:
    """Of a source in parts only the first: a line has no room for all."""
    first, *others = source.location.split(" + ")
    return f"{first} and {len(others)} more" if others else _source(source)


def _where(source: PackageSource | PartsSource | HubSource) -> str:
    if isinstance(source, HubSource):
        return f"hf:{source.repository}" + (f" @ {source.revision[:12]}" if source.revision else "")
    first, *others = source.packages
    more = f" and {len(others)} more" if others else ""
    return f"package {first.name} {first.version}{more}"


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, heading in enumerate(headings):
        number = heading in {"SIZE", "KL", "TOP-1"}
        # The name is what gets copied: the others give way on a narrow terminal.
        table.add_column(
            heading, justify="right" if number else "left", no_wrap=i == 0 or number, overflow="fold"
        )
    return table


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(console.printable(cell)) for cell in cells))


def _print_sections(title: str, sections: Mapping[str, Mapping[str, str]]) -> None:
    out = console.out()
    out.print(Text(console.printable(title), style="bold"))
    for name, rows in sections.items():
        out.print()
        out.print(Text(name, style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True, width=2 + max(14, *map(len, rows)))
        table.add_column(overflow="fold")
        for label, text in rows.items():
            table.add_row(f"  {label}", Text(console.printable(text)))
        out.print(table)
