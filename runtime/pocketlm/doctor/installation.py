"""What is installed, and what the cache folder holds."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.cache import bundles_folder, home
from pocketlm.doctor.check import Check
from pocketlm.errors import BundleError
from pocketlm.files import readable_size

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LITTLE_DISK = 2 << 30

_CORE = ("pocketlm", "onnxruntime", "numpy", "tokenizers", "huggingface_hub")
_NOT_FOR_USERS = {"test", "all"}


def versions() -> Iterator[Check]:
    """Of what computes here, and each package that is missing or too old."""
    found = {"python": platform.python_version(), **{name: installed(name) for name in _CORE}}
    yield Check(
        "versions",
        "ok",
        ", ".join(f"{name} {version}" for name, version in found.items() if version),
        facts={"versions": found},
    )
    for requirement in _requirements(""):
        version = installed(requirement.name)
        if fault := _fault(requirement, version):
            remedy = f'pip install --upgrade "{requirement.name}{requirement.specifier}"'
            yield Check(requirement.name, "problem", fault, remedy, {"version": version})


def extras() -> Iterator[Check]:
    """Which optional parts are installed, as the package's own metadata has them."""
    try:
        names = importlib.metadata.metadata("pocketlm").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("extras", "note", "pocketlm runs from its source folder, so nothing says what it needs")
        return
    missing = {name: _missing(name) for name in names if name not in _NOT_FOR_USERS}
    here = [name for name, packages in missing.items() if not packages]
    yield Check(
        "extras",
        "ok",
        f"installed: {', '.join(here) or 'none'}",
        facts={"installed": here, "missing": {name: lack for name, lack in missing.items() if lack}},
    )
    for name, packages in missing.items():
        if packages:
            text = f"not installed: it lacks {', '.join(packages)}"
            yield Check(name, "absent", text, f'pip install "pocketlm[{name}]"')


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(extra: str) -> list[str]:
    """What an extra needs and this environment lacks, other extras in it counted."""
    lacking = []
    for requirement in _requirements(extra):
        if requirement.name == "pocketlm":
            lacking += [name for inner in sorted(requirement.extras) for name in _missing(inner)]
        elif _fault(requirement, installed(requirement.name)):
            lacking.append(requirement.name)
    return lacking


def _requirements(extra: str) -> Iterator[Requirement]:
    """What pocketlm needs on this platform: without an extra what it always needs."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires("pocketlm") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always != bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
            yield requirement


def _fault(requirement: Requirement, version: str | None) -> str | None:
    if version is None:
        return f"not installed; pocketlm needs {requirement.name}{requirement.specifier}"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version} is installed; pocketlm needs {requirement.specifier}"
    return None


def folder() -> Iterator[Check]:
    """The cache: where it is, what it takes, and what the disk has left."""
    path = home()
    used, free = _size(path), shutil.disk_usage(_existing(path)).free
    facts = {"folder": str(path), "used_bytes": used, "free_bytes": free}
    if not os.access(_existing(path), os.W_OK):
        remedy = "Change its rights, or set POCKETLM_HOME to a folder that you may write to."
        yield Check("folder", "problem", f"{path} is not writable", remedy, facts)
        return
    little = free < LITTLE_DISK
    yield Check(
        "folder",
        "note" if little else "ok",
        f"{path} holds {readable_size(used)}; its disk has {readable_size(free)} left",
        "Free some space, or move the cache: POCKETLM_HOME." if little else None,
        facts,
    )


def models() -> Iterator[Check]:
    """The bundles that are here; names and sizes of their files are checked, hashes when they are used."""
    sound, damaged = [], []
    for path in _folders(bundles_folder()):
        try:
            sound.append(open_bundle(path, verify=False))
        except BundleError as error:
            damaged.append(Check(path.name, "problem", str(error), facts={"folder": str(path)}))
    yield _summary(sound)
    yield from damaged


def _summary(bundles: list[Bundle]) -> Check:
    if not bundles:
        return Check("models", "absent", "none yet", "pocketlm pull smollm2-135m", {"models": []})
    found = [
        {"name": each.manifest.name, "precision": each.manifest.precision.name, "bytes": each.manifest.bytes}
        for each in bundles
    ]
    text = ", ".join(f"{each['name']} {each['precision']}" for each in found)
    return Check("models", "ok", text, facts={"models": found})


def _folders(path: Path) -> Iterable[Path]:
    try:
        return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    """Bytes of all files below, links not followed."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process at work
                total += (Path(folder) / name).lstat().st_size
    return total


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(each for each in (path, *path.parents) if each.exists())
