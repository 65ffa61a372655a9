"""Which models a server offers, and under which names: settled when it starts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.engine import DEFAULT_CACHE_BYTES, DEFAULT_CONTEXT_LENGTH
from pocketlm.errors import InvalidSettingError, ModelNotFoundError
from pocketlm.hub import DEFAULT_PRECISION, PRECISIONS, cached_bundles, check_name, find_bundle
from pocketlm.manifest import MANIFEST_NAME, Manifest
from pocketlm.progress import Progress, silent
from pocketlm.server.memory import MemoryEstimate, estimate

_log = logging.getLogger("pocketlm.server")


@dataclass(frozen=True)
class ServedModel:
    """A model that a server may be asked for, and how it is to be loaded."""

    name: str  # what clients say: "smollm2-135m", of other precisions "smollm2-135m:int4"
    folder: Path
    manifest: Manifest
    modified_at: float  # epoch seconds, of the bundle
    wanted_context: int | None = None  # tokens; None: what `pocketlm.load` has by default
    concurrency: int = 8
    cache_bytes: int = DEFAULT_CACHE_BYTES

    @property
    def context_length(self) -> int:
        """Tokens: what is wanted, but no more than the model was trained for."""
        return min(self.wanted_context or DEFAULT_CONTEXT_LENGTH, self.manifest.dimensions.context_length)

    @property
    def memory(self) -> MemoryEstimate:
        """What it takes when it is loaded."""
        return estimate(
            self.manifest,
            context_length=self.context_length,
            concurrency=self.concurrency,
            cache_bytes=self.cache_bytes,
        )


def check_names(names: Sequence[str], precision: str | None = None) -> None:
    """Whether `served_models` knows what these mean: offline, and before anything is fetched.

    Raises what `pocketlm.hub.check_name` raises, and ModelNotFoundError if there is nothing in the cache.
    """
    for name in names:
        _check(name, precision)
    if not names:
        _cached(precision)


def served_models(
    names: Sequence[str],
    precision: str | None = None,
    progress: Progress = silent,
    *,
    context_length: int | None = None,
    concurrency: int = 8,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> list[ServedModel]:
    """The models that the operator names, fetched and exported first where they are not in the cache; without
    names all that is in the cache.

    Each of `names` is what `pocketlm.load` takes, and may end with ":int4" or another precision. A model
    goes by its manifest's name. Where several bundles share it, the one of the default precision, else the
    first, has the plain name, and the others have their precision behind it.

    `context_length` is in tokens; models that were trained for fewer have as many as that, which is logged.

    Raises what `pocketlm.hub.find_bundle` raises, InvalidSettingError, and ModelNotFoundError if there is
    nothing in the cache.
    """
    if context_length is not None and context_length < 2:
        raise InvalidSettingError(f"context_length is {context_length}; at least 2 tokens are expected.")
    check_names(names, precision)
    bundles = [_named(name, precision, progress) for name in names] or _cached(precision)
    bundles = list({bundle.folder.resolve(): bundle for bundle in bundles}.values())
    models = [
        ServedModel(
            name,
            bundle.folder,
            bundle.manifest,
            (bundle.folder / MANIFEST_NAME).stat().st_mtime,
            context_length,
            concurrency,
            cache_bytes,
        )
        for name, bundle in zip(_names(bundles), bundles, strict=True)
    ]
    for model in models:
        if context_length is not None and model.context_length < context_length:
            _log.warning(
                "%s was trained for %s tokens, so its context has as many, not %s",
                *(model.name, f"{model.context_length:,}", f"{context_length:,}"),
            )
    return models


def _check(name: str, precision: str | None) -> None:
    source, its_precision = _split(name, precision)
    try:
        check_name(source, precision=its_precision)
    except ModelNotFoundError:
        before, _, behind = name.rpartition(":")
        if source != name or not before:
            raise
        with contextlib.suppress(ModelNotFoundError):
            check_name(before)
            raise InvalidSettingError(
                f"the precision of {name!r} is {behind!r}, expected {' or '.join(PRECISIONS)}."
            ) from None
        raise


def _split(name: str, precision: str | None) -> tuple[str, str | None]:
    """ "smollm2-135m:int4" as the model's name and its precision, which is `precision` without one."""
    before, _, behind = name.rpartition(":")
    if before and behind in PRECISIONS and not name.startswith("hf:"):
        return before, behind
    return name, precision


def _named(name: str, precision: str | None, progress: Progress) -> Bundle:
    name, precision = _split(name, precision)
    # Not hashed here: loading does that.
    folder = find_bundle(name, precision=precision, verify=False, progress=progress)
    return open_bundle(folder, verify=False)


def _cached(precision: str | None) -> list[Bundle]:
    bundles = [each for each in cached_bundles() if precision in (None, each.manifest.precision.name)]
    if not bundles:
        at = f" of precision {precision}" if precision else ""
        raise ModelNotFoundError(
            f"there is no model{at} in the cache to serve. Name one, for example: "
            "pocketlm serve smollm2-135m. The known ones: pocketlm list --all"
        )
    return bundles


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """By bundle; no two are the same, whatever their case."""
    # Those of the default precision choose first; sorting keeps the order of the others.
    order = sorted(range(len(bundles)), key=lambda i: bundles[i].manifest.precision.name != DEFAULT_PRECISION)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for index in order:
        names[index] = next(name for name in _candidates(bundles[index]) if _is_free(name, taken))
        taken.add(names[index].lower())
    return [names[index] for index in range(len(bundles))]


def _is_free(name: str, taken: Collection[str]) -> bool:
    return name.lower() not in taken


def _candidates(bundle: Bundle) -> Iterator[str]:
    name, precision = bundle.manifest.name, bundle.manifest.precision.name
    yield name
    yield f"{name}:{precision}"
    yield bundle.folder.name
    number = 2
    while True:
        yield f"{name}:{precision}-{number}"
        number += 1
