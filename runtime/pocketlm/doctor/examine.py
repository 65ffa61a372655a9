"""All checks, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.doctor import energy, hardware, installation, privacy, self_test
from pocketlm.doctor.check import Check, Report
from pocketlm.errors import ModelNotFoundError, PocketlmError, did_you_mean
from pocketlm.hub import cached_bundles
from pocketlm.manifest import MANIFEST_NAME
from pocketlm.progress import Progress, silent


def examine(
    model: str | None = None,
    *,
    measure_bandwidth: bool = True,
    test_network: bool = True,
    progress: Progress = silent,
) -> Report:
    """All checks, in a few seconds. `model` is what the self-test runs and what threads are tuned for: a name
    as `pocketlm list` has it or a bundle's folder, by default the smallest bundle in the cache.

    Raises ModelNotFoundError for a `model` that is not on this machine, and BundleError for a damaged one.
    """
    bundle = find_local(model)
    sections: list[tuple[str, str, Callable[[], Iterable[Check]]]] = [
        ("Device", "processor", hardware.processor),
        ("Device", "threads", lambda: hardware.threads(bundle)),
        ("Device", "memory", hardware.free_memory),
    ]
    if measure_bandwidth:
        sections.append(("Device", "bandwidth", lambda: hardware.bandwidth(progress)))
    sections += [
        ("Energy", "source", energy.sources),
        ("Installation", "versions", installation.versions),
        ("Installation", "extras", installation.extras),
        ("Cache", "folder", installation.folder),
        ("Cache", "models", installation.models),
        ("Privacy", "telemetry", privacy.telemetry),
        ("Privacy", "hub", privacy.hub),
        ("Privacy", "proxies", privacy.proxies),
    ]
    if test_network:
        sections.append(("Privacy", "self-test", lambda: self_test.without_network(bundle, progress)))
    return Report(tuple(check for section in sections for check in _checked(*section)))


def find_local(model: str | None) -> Bundle | None:
    """The bundle of that name or path if it is on this machine; without a name the smallest, if there is one.

    Raises as `examine`.
    """
    if model is not None and (folder := Path(model).expanduser()) and (folder / MANIFEST_NAME).is_file():
        return open_bundle(folder, verify=False)
    bundles = sorted(cached_bundles(), key=lambda bundle: bundle.manifest.bytes)
    if model is None:
        return next(iter(bundles), None)
    for bundle in bundles:
        if model in (bundle.manifest.name, bundle.folder.name):
            return bundle
    known = {bundle.manifest.name for bundle in bundles}
    raise ModelNotFoundError(
        f"there is no model {model!r} on this machine.{did_you_mean(model, known)} "
        f"Fetch it with: pocketlm pull {model}"
    )


def _checked(group: str, name: str, section: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    try:
        found = list(section())
    except PocketlmError as error:
        found = [Check(name, "problem", str(error))]
    except Exception as error:  # what cannot be looked at must not hide the rest
        found = [Check(name, "problem", f"could not be looked at: {type(error).__name__}: {error}")]
    for check in found:
        yield check.of(group)
