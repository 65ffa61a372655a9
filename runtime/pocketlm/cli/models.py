"""`pocketlm pull`, `list`, `show` and `rm`: the models that are here and those that could be."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketlm.cli import console, options
from pocketlm.errors import ModelNotFoundError, PocketlmError, did_you_mean

if TYPE_CHECKING:
    from pocketlm.bundle import Bundle
    from pocketlm_models import CatalogueEntry

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def pull(
    model: options.Model,
    *,
    precision: options.PrecisionName = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make it again, whatever is here; mends a damaged one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a model and convert it, ready to run offline."""
    from pocketlm import hub
    from pocketlm.bundle import open_bundle

    with console.progress() as progress:
        folder = hub.pull(model, precision=precision, force=force, progress=progress)
    bundle = open_bundle(folder, verify=False)
    if as_json:
        console.write_json(as_object(bundle))
    else:
        console.write(f"{_label(bundle)} is in {folder}\n")


def list_(
    *,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Also the models of the catalogue that are not here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the models that are here."""
    from pocketlm import hub
    from pocketlm_models import catalogue

    bundles = hub.cached_bundles()
    here = {bundle.manifest.name for bundle in bundles}
    others = [entry for name, entry in catalogue().items() if name not in here] if everything else []
    if as_json:
        console.write_json([*map(as_object, bundles), *map(entry_as_object, others)])
        return
    from pocketlm.cli import tables

    if bundles:
        tables.print_bundles(zip(_names(bundles), bundles, strict=True))
    else:
        console.note("There is no model here yet. Fetch one with: pocketlm pull smollm2-135m")
    if others:
        tables.print_entries(others)
    elif not bundles and not everything:
        console.note("Known models: pocketlm list --all")


def show(
    model: options.Model,
    *,
    precision: options.PrecisionName = None,
    as_json: Json = False,
) -> None:
    """Show a model's size, precision, quality, source and licence."""
    from pocketlm.cli import tables
    from pocketlm_models import catalogue

    bundles = _bundles_of(model, precision)
    if bundles:
        if as_json:
            console.write_json([as_object(bundle) for bundle in bundles])
        else:
            tables.print_details(bundles)
        return
    entry = catalogue().get(model)
    if entry is None:
        raise _not_here(model, precision)
    if as_json:
        console.write_json([entry_as_object(entry)])
    else:
        tables.print_entry(entry)
        console.note(f"It is not here yet. Fetch it with: pocketlm pull {entry.name}")


def rm(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Names as `pocketlm list` has them.",
            autocompletion=options.complete_model,
        ),
    ],
    *,
    precision: options.PrecisionName = None,
    source: Annotated[
        bool,
        typer.Option(
            "--source", help="Also the downloaded weights that it was made from (of the package index)."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove models from this machine."""
    from pocketlm import hub

    removed = []
    for model in models:
        bundles = _bundles_of(model, precision, cached_only=True)
        # A name that stands for nothing is not asked about: `remove` says what is wrong with it.
        if bundles and not yes and sys.stdin.isatty():
            question = f"Remove {' and '.join(map(_label, bundles))}?"
            if not typer.confirm(question, err=True):
                raise typer.Exit(1)
        for folder in hub.remove(model, precision=precision, source=source):
            removed.append(str(folder))
            if not as_json:
                console.write(f"Removed {folder}\n")
    if as_json:
        console.write_json(removed)


def known_names() -> list[str]:
    """What can be typed for a model: the names in the cache and in the catalogue."""
    from pocketlm import hub
    from pocketlm_models import catalogue

    return sorted({*_names(hub.cached_bundles()), *catalogue()})


def as_object(bundle: Bundle) -> dict[str, Any]:
    """A bundle as `--json` prints it."""
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "pulled": True,
        "precision": manifest.precision.name,
        "bytes": manifest.bytes,
        "folder": str(bundle.folder),
        "manifest": dataclasses.asdict(manifest),
    }


def entry_as_object(entry: CatalogueEntry) -> dict[str, Any]:
    """A model of the catalogue that is not here, as `--json` prints it."""
    return {
        "name": entry.name,
        "pulled": False,
        "precision": entry.precision,
        "catalogue": dataclasses.asdict(entry),
    }


def _label(bundle: Bundle) -> str:
    from pocketlm.files import readable_size

    manifest = bundle.manifest
    return f"{manifest.name} ({manifest.precision.name}, {readable_size(manifest.bytes)})"


def _names(bundles: list[Bundle]) -> list[str]:
    """What to type for each: the folder's name where the model's own stands for several."""
    own = Counter((bundle.manifest.name, bundle.manifest.precision.name) for bundle in bundles)
    return [
        manifest.name if own[manifest.name, manifest.precision.name] == 1 else bundle.folder.name
        for bundle in bundles
        for manifest in [bundle.manifest]
    ]


def _bundles_of(name: str, precision: str | None, *, cached_only: bool = False) -> list[Bundle]:
    """What `name` stands for: the bundle at a path, else those made from it, else those called so."""
    from pocketlm import hub
    from pocketlm.bundle import open_bundle
    from pocketlm.cache import read_origin
    from pocketlm.manifest import MANIFEST_NAME
    from pocketlm.sources import local_request

    path = _path(name)
    if (path / MANIFEST_NAME).is_file():
        return [] if cached_only else [open_bundle(path, verify=False)]
    cached = [
        bundle for bundle in hub.cached_bundles() if precision in (None, bundle.manifest.precision.name)
    ]
    local = local_request(path).folder if path.exists() else None
    made_from_it = [
        bundle
        for bundle in cached
        if bundle.folder.name.rpartition("-")[0] == local
        or ((origin := read_origin(bundle.folder)) is not None and origin.asked == name)
    ]
    return made_from_it or [bundle for bundle in cached if name in (bundle.manifest.name, bundle.folder.name)]


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path's own raises for an unknown ~user)


def _not_here(name: str, precision: str | None) -> PocketlmError:
    if name.startswith("hf:") or _path(name).exists():
        return ModelNotFoundError(f"{name} is not converted yet. Do it with: pocketlm pull {name}")
    known = known_names()
    at = f" at {precision}" if precision and name in known else ""
    return ModelNotFoundError(
        f"there is no model {name!r}{at}.{did_you_mean(name, known)} The known ones: pocketlm list --all"
    )
