"""Files and folders that are whole or absent, hashes, and disk errors in words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pocketlm.errors import StorageError
from pocketlm.manifest import MANIFEST_NAME
from pocketlm.progress import Progress, silent

_BUFFER_BYTES = 1 << 20
_TEMPORARY_SUFFIX = ".partial"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO}


def sha256_of(path: Path, *, progress: Progress = silent) -> str:
    """The file's SHA-256 as 64 lower-case hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    done = 0
    with path.open("rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            progress(f"Checking {path.name}", done, total, "B")
    return digest.hexdigest()


def readable_size(count: int) -> str:
    """`count` bytes for a person: "98.4 MB" (decimal units, as disks and downloads are sold)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@contextmanager
def disk_errors(path: Path, *, setting: str = "POCKETLM_HOME") -> Iterator[None]:
    """Turns a full disk and a place that cannot be written, met while writing `path`, into StorageError.

    `setting` is the environment variable that moves the cache in question.

    Any other OSError passes, and so does such an error about a file that has nothing to do with `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"{path} could not be written: the disk is full ({_free_space(path)} free). Free some space, "
                f"or use a folder on another disk ({setting} moves the cache)."
            ) from error
        if error.errno in _REFUSED and _concerns(error, path):
            raise StorageError(
                f"{path} could not be written: {os.strerror(error.errno or 0)} ({error.filename or path}). "
                f"Use a folder that you may write to ({setting} moves the cache), or change its rights."
            ) from error
        raise


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yields a new temporary folder beside `destination` that takes its place when the block succeeds.

    When the block raises, the temporary folder is removed and `destination` is as it was. A process
    that is killed leaves a folder that `sweep_temporaries` recognises. Only a missing or empty folder
    or an earlier bundle is ever replaced: StorageError otherwise, before the block runs. A full or
    unwritable disk is a StorageError, also when the block itself meets it.
    """
    destination = Path(os.path.realpath(destination))
    refuse_to_replace(destination)
    temporary = temporary_sibling(destination)
    try:
        with disk_errors(destination):
            temporary.mkdir(parents=True)
            yield temporary
            refuse_to_replace(destination)
            sync_folder(temporary)
            replace_folder(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8, line ends as they are) so that `path` is the old file or the new one.

    Raises StorageError if the disk is full or the folder not writable.
    """
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file, open for writing, that takes the place of `path` when the block succeeds.

    When the block raises, `path` is as it was. Raises StorageError if the disk is full or the folder not
    writable.
    """
    path = Path(os.path.realpath(path))
    temporary = temporary_sibling(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def temporary_sibling(path: Path) -> Path:
    """A new hidden name beside `path`, on the same file system; nothing is created."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")


def sweep_temporaries(path: Path) -> None:
    """Removes what killed processes left of `path`. Only for a caller whose lock keeps other writers away."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(_TEMPORARY_SUFFIX)}")
    with contextlib.suppress(FileNotFoundError):
        for sibling in list(path.parent.iterdir()):
            if pattern.fullmatch(sibling.name):
                # What cannot be removed now (a dying child may still write there) goes the next time.
                if sibling.is_dir() and not sibling.is_symlink():
                    shutil.rmtree(sibling, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        sibling.unlink()


def replace_folder(new: Path, destination: Path) -> None:
    """Renames `new` to `destination`, whatever folder is there now. Raises OSError; then nothing has changed.

    No system renames over a folder with files, so the old one steps aside first: a kill between the two
    renames leaves no `destination`, never a mixture.
    """
    aside = temporary_sibling(destination)
    try:
        destination.rename(aside)
    except FileNotFoundError:
        new.rename(destination)
    else:
        try:
            new.rename(destination)
        except BaseException:
            aside.rename(destination)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(destination.parent)


def sync_folder(folder: Path) -> None:
    """Brings the folder's files and their names onto the disk, so that a rename cannot outrun them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            _sync(path)
    for path in (*(inner for inner in folder.rglob("*") if inner.is_dir()), folder):
        _sync(path)


def refuse_to_replace(destination: Path) -> None:
    """Raises StorageError if `destination` holds anything that is not an earlier bundle."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise StorageError(f"{destination} is a file, expected a folder. Choose another output folder.")
    with disk_errors(destination):
        foreign = {path.name for path in destination.iterdir()} - {MANIFEST_NAME, *_listed_files(destination)}
    if foreign:
        raise StorageError(
            f"{destination} holds files that belong to no bundle "
            f"({', '.join(sorted(foreign)[:3])}{', …' if len(foreign) > 3 else ''}) and is left as it is. "
            "Choose a new or an empty folder."
        )


def _listed_files(folder: Path) -> set[str]:
    """The names in the bundle's manifest, read leniently: a bundle of another version may be replaced too."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return set(manifest["files"]) if "format_version" in manifest else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle to sync a folder with.
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _concerns(error: OSError, path: Path) -> bool:
    if not isinstance(error.filename, str):
        return True
    named, wanted = Path(os.path.realpath(error.filename)), Path(os.path.realpath(path))
    return named.is_relative_to(wanted.parent) or wanted.is_relative_to(named)


def _free_space(path: Path) -> str:
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return readable_size(shutil.disk_usage(folder).free)
    return "an unknown amount"
