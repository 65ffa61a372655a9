"""From a model's name to a verified bundle on this machine.

What may stand for a model, in the order in which it is looked up:

    smollm2-135m                 a name of the catalogue
    hf:ORG/REPO[@REVISION]       the safetensors weights of a repository of the Hugging Face Hub
    hf:ORG/REPO[@REV]:FILE.gguf  one GGUF file of it
    a path                       of a bundle folder, a checkpoint folder or a .gguf file
    smollm2-360m-instruct-…      the name of a bundle that is in the cache

A bundle folder is used as it is. All else is exported once, by the exporter that is installed, into the
cache (see cache.py).
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast, get_args, get_type_hints

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.cache import Origin, bundles_folder, home, locked, read_origin, staging, write_origin
from pocketlm.errors import (
    BundleError,
    CheckpointError,
    InvalidSettingError,
    MissingExtraError,
    ModelNotFoundError,
    did_you_mean,
)
from pocketlm.files import disk_errors, replace_folder, sweep_temporaries, sync_folder, temporary_sibling
from pocketlm.huggingface import PREFIX, SYNTAX, HubRequest, parse_hub_name
from pocketlm.manifest import MANIFEST_NAME, Manifest, Precision, read_manifest
from pocketlm.package_index import PackageRequest
from pocketlm.progress import Progress, silent
from pocketlm.sources import Request, SourceFiles, local_request
from pocketlm_models import CatalogueEntry, HubSource, catalogue

__all__ = [
    "SourceFiles",
    "cached_bundles",
    "check_name",
    "fetch_source",
    "find_bundle",
    "home",
    "pull",
    "remove",
]

DEFAULT_PRECISION = "int8"
PRECISIONS: tuple[str, ...] = get_args(get_type_hints(Precision)["name"])

_log = logging.getLogger("pocketlm")


class Export(Protocol):
    """The function behind the entry point `export` of the group `pocketlm.exporter`.

    It writes a whole bundle to `output` or nothing, and raises CheckpointError, QualityGateError or
    StorageError.
    """

    def __call__(
        self,
        source: SourceFiles,
        output: Path,
        *,
        precision: str = "int8",
        max_kl: float | None = None,
        progress: Progress = silent,
    ) -> Manifest: ...


def fetch_source(source: str | Path, *, progress: Progress = silent) -> SourceFiles:
    """The weights that `source` names, downloaded if they are not on this machine yet.

    Raises ModelNotFoundError, DownloadError, StorageError, CheckpointError or UnsupportedModelError.
    """
    return _request(source).fetch(progress)


@dataclass(frozen=True)
class _Wanted:
    """A source at a precision, and the folder of the cache for its bundle."""

    request: Request
    precision: str
    folder: Path


def check_name(name_or_path: str | Path, *, precision: str | None = None) -> None:
    """Whether `find_bundle` knows what is meant: offline, nothing is fetched and no weights are read.

    Raises ModelNotFoundError, CheckpointError, InvalidSettingError, and BundleError for a bundle folder that
    is incomplete.
    """
    found = _resolved(name_or_path, precision)
    if isinstance(found, Path):
        _as_it_is(found, precision, False, silent)


def find_bundle(
    name_or_path: str | Path,
    *,
    precision: str | None = None,
    verify: bool = True,
    progress: Progress = silent,
) -> Path:
    """The folder of a bundle: a cached one, offline, or else one that is fetched and exported now.

    Its hashes have been checked when this returns, unless `verify` leaves that to the caller.

    Raises BundleError if a bundle is damaged (`pull` makes it again, this does not), and what `pull` raises.
    """
    wanted = _resolved(name_or_path, precision)
    if isinstance(wanted, Path):
        return _as_it_is(wanted, precision, verify, progress)
    with contextlib.suppress(BundleError):  # looked at again below: another process may be replacing it
        if _sound_origin(wanted, progress, verify=verify):
            return wanted.folder
    with locked(wanted.folder, progress):
        try:
            origin = _sound_origin(wanted, progress, verify=verify)
        except BundleError as error:
            raise type(error)(f"{error} For this one: {_pull_command(name_or_path, precision)}") from error
        if origin is None:
            _make(wanted, None, progress)
    return wanted.folder


def pull(
    name: str | Path, *, precision: str | None = None, force: bool = False, progress: Progress = silent
) -> Path:
    """Fetches and exports a model into the cache; returns the bundle's folder.

    Nothing is done if a sound bundle of the same weights is there, unless `force`. Where a branch of the Hub
    is asked for, its newest commit is fetched; a damaged bundle is logged and made again.

    Raises ModelNotFoundError, DownloadError, CheckpointError (or UnsupportedModelError), QualityGateError,
    MissingExtraError (no exporter installed), StorageError and InvalidSettingError.
    """
    _check_precision(precision)
    try:
        wanted = _wanted(name, precision)
    except ModelNotFoundError:
        folder = _cached_under(str(name), precision)
        origin = read_origin(folder) if folder else None
        if origin is None or origin.asked is None:
            raise
        wanted = _wanted(origin.asked, precision)
    with locked(wanted.folder, progress):
        origin = None
        if not force:
            try:
                origin = _sound_origin(wanted, progress)
            except BundleError as error:
                _log.warning("The cached bundle is damaged and is made again: %s", error)
        if origin is None or not wanted.request.pinned:
            _make(wanted, origin, progress)
    return wanted.folder


def cached_bundles() -> list[Bundle]:
    """The bundles in the cache, by folder name. Hashes are not checked; damaged bundles are left out."""
    bundles = []
    for folder in _cached_folders():
        with contextlib.suppress(BundleError):
            bundles.append(open_bundle(folder, verify=False))
    return bundles


def remove(name: str | Path, *, precision: str | None = None, source: bool = False) -> list[Path]:
    """Removes the cached bundles of a model, of all precisions unless one is given; returns their folders.

    `name` is what `pull` or `find_bundle` took, or the name of a cached bundle. With `source`, weights from
    the package index go too; what came from the Hugging Face Hub belongs to the Hub's own cache (hf cache).
    Nothing outside the cache is ever touched.

    Raises ModelNotFoundError if the cache holds nothing of that name, StorageError.
    """
    _check_precision(precision)
    folders: list[Path] = []
    # A file that is gone may still have its bundle here, under the bundle's name.
    with contextlib.suppress(ModelNotFoundError, CheckpointError):
        request = _request(name)
        wanted = [_folder(request, each) for each in ([precision] if precision else PRECISIONS)]
        folders = [folder for folder in wanted if folder.exists()]
        if source and isinstance(request, PackageRequest) and request.source_folder.exists():
            folders.append(request.source_folder)
    if not folders and str(name) not in catalogue():
        folders = _named(str(name), precision)
    if not folders:
        known = sorted({bundle.manifest.name for bundle in cached_bundles()})
        at = f" at {precision}" if precision else ""
        raise ModelNotFoundError(
            f"the cache holds no bundle of {_quoted(name)}{at}.{did_you_mean(str(name), known)} "
            f"It holds: {', '.join(known) or 'nothing'}."
        )
    for folder in folders:
        with locked(folder), disk_errors(folder):
            with contextlib.suppress(FileNotFoundError):
                folder.rename(temporary_sibling(folder))
            sweep_temporaries(folder)
    return folders


def _make(wanted: _Wanted, cached: Origin | None, progress: Progress) -> None:
    """Fetches and exports, under the target's lock; `cached` is the origin of the sound bundle there."""
    if cached is None:
        _exporter()  # before a long download
    # Before the files are read: if they change while they are, the bundle does not pass for the new ones.
    fingerprint = wanted.request.fingerprint()
    source = wanted.request.fetch(progress)
    if cached is not None and cached.revision == source.revision:
        return
    export = _exporter()
    with staging(wanted.folder) as work:
        output = work / "bundle"
        export(source, output, precision=wanted.precision, progress=progress)
        made = open_bundle(output, verify=False).manifest.precision.name
        if made != wanted.precision:
            raise BundleError(f"the exporter made a bundle of precision {made}, expected {wanted.precision}.")
        write_origin(output, Origin(wanted.request.asked, fingerprint, source.revision))
        sync_folder(output)
        replace_folder(output, wanted.folder)


def _exporter() -> Export:
    """The installed exporter. Raises MissingExtraError if it, or a package that it needs, is not there."""
    for point in entry_points(group="pocketlm.exporter", name="export"):
        try:
            return cast(Export, point.load())
        except ModuleNotFoundError as error:
            raise MissingExtraError("Converting a checkpoint", "export") from error
    raise MissingExtraError("Converting a checkpoint", "export")


def _sound_origin(wanted: _Wanted, progress: Progress, *, verify: bool = True) -> Origin | None:
    """The origin of the cached bundle, if there is one of the very source that is wanted.

    Raises BundleError if there is, but damaged.
    """
    origin = read_origin(wanted.folder)
    if origin is None or origin.fingerprint != wanted.request.fingerprint():
        return None
    open_bundle(wanted.folder, verify=verify, progress=progress)
    return origin


def _as_it_is(folder: Path, precision: str | None, verify: bool, progress: Progress) -> Path:
    found = open_bundle(folder, verify=verify, progress=progress).manifest.precision.name
    if precision is not None and precision != found:
        raise InvalidSettingError(
            f"{folder} is a bundle of precision {found}, but {precision} was asked for. Leave the precision "
            "out, or name the model's source."
        )
    return folder


def _resolved(name: str | Path, precision: str | None) -> _Wanted | Path:
    """A source, or the folder of a bundle that is used as it is."""
    _check_precision(precision)
    if (folder := _bundle_folder(name)) is not None:
        return folder
    try:
        return _wanted(name, precision)
    except ModelNotFoundError:
        if (folder := _cached_under(str(name), precision)) is None:
            raise
        return folder


def _wanted(name: str | Path, precision: str | None) -> _Wanted:
    request = _request(name)
    chosen = precision or request.precision or DEFAULT_PRECISION
    return _Wanted(request, chosen, _folder(request, chosen))


def _folder(request: Request, precision: str) -> Path:
    return bundles_folder() / f"{request.folder}-{precision}"


def _request(name: str | Path) -> Request:
    """What `name` stands for. Raises ModelNotFoundError, or CheckpointError for a bundle folder."""
    if isinstance(name, str):
        if name.startswith(PREFIX):
            return parse_hub_name(name)
        if entry := catalogue().get(name):
            return _catalogue_request(entry)
    if isinstance(name, Path) or (name and _exists(_path(name))):
        return local_request(_path(name))
    raise _unknown(name)


def _catalogue_request(entry: CatalogueEntry) -> Request:
    source = entry.source
    if isinstance(source, HubSource):
        return HubRequest(
            source.repository,
            source.revision,
            source.file,
            catalogue_name=entry.name,
            licence=entry.licence,
            precision=entry.precision,
        )
    return PackageRequest(entry, source)


def _unknown(text: str) -> ModelNotFoundError:
    if "://" in text:
        return ModelNotFoundError(f"{_quoted(text)} is an address. For the Hugging Face Hub write {SYNTAX}.")
    if re.search(r"[/\\]|\.gguf$|^[.~]", text):
        hub_like = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) and not text.endswith(".gguf")
        hint = f" For the Hugging Face Hub write {PREFIX}{text}." if hub_like else ""
        return ModelNotFoundError(f"there is no file or folder {_quoted(text)}. Check the path.{hint}")
    known = catalogue()
    return ModelNotFoundError(
        f"there is no model {_quoted(text)}.{did_you_mean(text, known)} Known names: {', '.join(known)}. Any "
        f"other model goes by its source: {SYNTAX}, or the path of a .gguf file, a checkpoint folder or a "
        "bundle folder."
    )


def _bundle_folder(name: str | Path) -> Path | None:
    if isinstance(name, str) and (not name or name in catalogue() or name.startswith(PREFIX)):
        return None
    folder = _path(name)
    return folder if _exists(folder / MANIFEST_NAME) else None


def _path(name: str | Path) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # "~name" of nobody's
        return Path(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a path: somebody's prompt, perhaps
        return False


def _cached_under(name: str, precision: str | None) -> Path | None:
    """The one cached bundle of that name. Raises ModelNotFoundError if there are several."""
    folders = _named(name, precision)
    if len(folders) > 1 and precision is None:
        folders = _named(name, DEFAULT_PRECISION) or folders
    if len(folders) > 1:
        raise ModelNotFoundError(
            f"{_quoted(name)} stands for several cached bundles: {', '.join(path.name for path in folders)}. "
            "Use one of these names."
        )
    return folders[0] if folders else None


def _named(name: str, precision: str | None) -> list[Path]:
    """Cached bundles by folder name or by their manifest's name; a damaged one only by its folder name."""
    found = []
    for folder in _cached_folders():
        try:
            manifest = read_manifest(folder)
            names, its_precision = {folder.name, manifest.name}, manifest.precision.name
        except BundleError:
            names, its_precision = {folder.name}, cast(Any, folder.name.rpartition("-")[2])
        if name in names and precision in (None, its_precision):
            found.append(folder)
    return found


def _cached_folders() -> list[Path]:
    try:
        paths = sorted(bundles_folder().iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for path in paths if path.is_dir() and not path.name.startswith(".")]


def _check_precision(precision: str | None) -> None:
    if precision is not None and precision not in PRECISIONS:
        raise InvalidSettingError(f"the precision is {precision!r}, expected {' or '.join(PRECISIONS)}.")


def _pull_command(name: str | Path, precision: str | None) -> str:
    option = f" --precision {precision}" if precision else ""
    return f"pocketlm pull {shlex.quote(str(name))}{option} --force"


def _quoted(name: str | Path) -> str:
    text = str(name)
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
