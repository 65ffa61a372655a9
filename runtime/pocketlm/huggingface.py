"""Weights from the Hugging Face Hub: `hf:ORG/REPO[@REVISION][:FILE.gguf]`.

Without a file name the safetensors weights are fetched, with one that GGUF file alone. The files stay in the
Hub's own cache, which other programs share; HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they
mean everywhere. The Hub's telemetry is switched off.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pocketlm.errors import DownloadError, ModelNotFoundError, PocketlmError, UnsupportedModelError
from pocketlm.files import disk_errors, sha256_of
from pocketlm.progress import Progress
from pocketlm.sources import SourceFiles, checkpoint_files, fingerprint_of, short_name

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

PREFIX = "hf:"
SYNTAX = "hf:ORG/REPO[@REVISION][:FILE.gguf]"
_NAME = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)"
    r"(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\\\s][^:\\]*\.gguf))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 30
_POLL_S = 0.1

_log = logging.getLogger("pocketlm")

T = TypeVar("T")


@dataclass(frozen=True)
class HubRequest:
    """A repository of the Hub, or one GGUF file of it.

    Its cached bundle is keyed by repository, revision as asked for and file. Where the revision is a
    branch, `pocketlm pull` looks whether it has moved; running the model uses what is cached, offline.
    """

    repository: str
    revision: str | None = None
    file: str | None = None
    catalogue_name: str | None = None
    licence: str | None = None
    precision: str | None = None

    @property
    def location(self) -> str:
        return f"{PREFIX}{self.repository}" + (f":{self.file}" if self.file else "")

    @property
    def name(self) -> str:
        stem = Path(self.file).stem if self.file else self.repository.partition("/")[2]
        return self.catalogue_name or short_name(stem)

    @property
    def folder(self) -> str:
        if self.catalogue_name:
            return self.catalogue_name
        return f"{self.name}-{self.fingerprint()[:8]}"

    @property
    def asked(self) -> str | None:
        if self.catalogue_name:
            return self.catalogue_name
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repository}{revision}" + (f":{self.file}" if self.file else "")

    @property
    def pinned(self) -> bool:
        return bool(_COMMIT.fullmatch(self.revision or ""))

    def fingerprint(self) -> str:
        return fingerprint_of("hub", self.repository.lower(), self.revision or "main", self.file)

    def fetch(self, progress: Progress) -> SourceFiles:
        """Downloads what the Hub's cache lacks.

        Raises DownloadError, ModelNotFoundError, StorageError, or UnsupportedModelError if the repository
        holds nothing that pocketlm reads.
        """
        from huggingface_hub import constants

        with _quiet_hub(), _hub_errors(self):
            if constants.HF_HUB_OFFLINE:
                folder, licence = self._cached(), None
            else:
                folder, licence = self._download(progress)
            if not self.file:
                checkpoint_files([path.name for path in folder.iterdir()], self.location)
        path = folder / self.file if self.file else folder
        return SourceFiles(path, self.name, self.location, folder.name, self.licence or licence)

    def _cached(self) -> Path:
        """The snapshot in the Hub's own cache, without the network."""
        from huggingface_hub import try_to_load_from_cache

        marker = self.file or "config.json"
        path = try_to_load_from_cache(self.repository, marker, revision=self.revision)
        if not isinstance(path, str):
            raise DownloadError(
                f"{self.asked} is not in the cache of the Hugging Face Hub, and HF_HUB_OFFLINE forbids to "
                "download it. Unset HF_HUB_OFFLINE, or give the path of a folder or a .gguf file."
            )
        return Path(path).parents[len(Path(marker).parts) - 1]

    def _download(self, progress: Progress) -> tuple[Path, str | None]:
        """The snapshot's folder and the licence that the model's card names."""
        from huggingface_hub import HfApi, hf_hub_download

        info = HfApi().model_info(
            self.repository, revision=self.revision, files_metadata=True, timeout=_TIMEOUT_S
        )
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise DownloadError(
                f"{self.asked}: the Hub names no commit for it ({commit!r}). Try again later."
            )
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        wanted = [siblings[name] for name in self._wanted(list(siblings))]
        total = sum(sibling.size or 0 for sibling in wanted)
        done = 0
        path = ""
        for sibling in wanted:
            path = self._download_file(sibling, commit, done, total, progress)
            done += sibling.size or 0
        progress(f"Downloading {self.name}", total, total, "B")
        if not self.pinned:
            # Under the revision's own name, the Hub's cache will find the snapshot offline too.
            hf_hub_download(self.repository, wanted[0].rfilename, revision=self.revision)
        licence = info.card_data.license if info.card_data else None
        folder = Path(path).parents[len(Path(wanted[-1].rfilename).parts) - 1]
        return folder, licence if isinstance(licence, str) else None

    def _wanted(self, names: list[str]) -> list[str]:
        """The repository's files to download."""
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        if self.file and self.file not in ggufs:
            raise ModelNotFoundError(
                f"{PREFIX}{self.repository} has no file {self.file}. It has "
                f"{', '.join(ggufs) or 'no .gguf file'}."
            )
        if self.file:
            return [self.file]
        if ggufs and not any(name.endswith(".safetensors") for name in names):
            raise UnsupportedModelError(
                f"{self.asked} holds GGUF files only. Name one: "
                f"{', '.join(f'{self.asked}:{name}' for name in ggufs[:8])}{', …' if len(ggufs) > 8 else ''}."
            )
        return checkpoint_files(names, self.location)

    def _download_file(
        self, sibling: RepoSibling, commit: str, done: int, total: int, progress: Progress
    ) -> str:
        """One file, checked against the size and, for large ones, the sha256 that the Hub states."""
        from huggingface_hub import hf_hub_download

        name = sibling.rfilename
        started = time.time()

        def watch() -> None:
            growing = min(self._growing_bytes(started), sibling.size or 0)
            progress(f"Downloading {self.name}", min(done + growing, total - 1), total, "B")

        problem = ""
        for force in (False, True):  # a damaged file of the cache is fetched once more
            # A file at a time, not snapshot_download: its thread pool would keep Ctrl-C waiting for the end.
            download = partial(hf_hub_download, self.repository, name, revision=commit, force_download=force)
            path = str(_watched(download, watch))
            problem = _problem(Path(path), sibling, progress)
            if not problem:
                return path
            _log.warning("%s of %s %s; downloading it again.", name, self.location, problem)
        raise DownloadError(
            f"{name} of {self.location} {problem}, twice. The Hub or a proxy on the way serves something "
            "else than it announces: try again later, or check HF_ENDPOINT."
        )

    def _growing_bytes(self, started: float) -> int:
        """Size of the file that the Hub's client is writing now."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        repository = repo_folder_name(repo_id=self.repository, repo_type="model")
        size = 0
        for path in Path(constants.HF_HUB_CACHE, repository, "blobs").glob("*.incomplete"):
            with contextlib.suppress(OSError):  # it may have just been renamed
                status = path.stat()
                if status.st_mtime >= started:
                    size = max(size, status.st_size)
        return size


def parse_hub_name(text: str) -> HubRequest:
    """The request that `hf:…` spells out. Raises ModelNotFoundError if it does not follow the syntax."""
    match = _NAME.fullmatch(text)
    if match is None or {"..", "."} & set((match["file"] or "").split("/")):
        raise ModelNotFoundError(
            f"{text!r} does not name a model of the Hugging Face Hub. Expected {SYNTAX}, for example "
            "hf:HuggingFaceTB/SmolLM2-360M-Instruct."
        )
    return HubRequest(match["repository"], match["revision"], match["file"])


def _problem(path: Path, sibling: RepoSibling, progress: Progress) -> str:
    """What is wrong with a downloaded file, or the empty string."""
    size = path.stat().st_size
    if sibling.size is not None and size != sibling.size:
        return f"has {size:,} bytes, expected {sibling.size:,}"
    if sibling.lfs and (found := sha256_of(path, progress=progress)) != sibling.lfs.sha256:
        return f"has the sha256 {found}, expected {sibling.lfs.sha256}"
    return ""


def _watched(work: Callable[[], T], watch: Callable[[], None]) -> T:
    """Runs `work` in a thread and `watch` here, again and again, until it is done."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: Ctrl-C ends the program without waiting for the download.
    threading.Thread(target=run, daemon=True).start()
    while not wait([future], timeout=_POLL_S).done:
        watch()
    return future.result()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No telemetry (for good) and none of the Hub client's own progress bars (for the block)."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    constants.HF_HUB_DISABLE_TELEMETRY = True
    # Only where the user's environment does not decide it.
    ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if ours:
        disable_progress_bars()
    try:
        yield
    finally:
        if ours:
            enable_progress_bars()


@contextmanager
def _hub_errors(request: HubRequest) -> Iterator[None]:
    """Turns whatever the Hub's client raises into one of pocketlm's errors.

    Any exception: the client's errors share no root, and those of its transport (requests in one version,
    httpx in the next, a native extension for large files) are not its own.
    """
    from huggingface_hub import constants

    try:
        with disk_errors(Path(constants.HF_HUB_CACHE), setting="HF_HOME"):
            yield
    except PocketlmError:
        raise
    except Exception as error:
        raise _explain(request, error) from error


def _explain(request: HubRequest, error: Exception) -> PocketlmError:
    from huggingface_hub import constants, errors

    url = f"{constants.ENDPOINT}/{request.repository}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"{request.asked} is gated. Accept its terms at {url}, create a token on the Hub and set "
            "HF_TOKEN to it."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the Hugging Face Hub has no repository {request.repository} that you may read. Check the name; "
            "if it is private, set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{PREFIX}{request.repository} has no revision {request.revision}. See {url}/tree/main for its "
            "branches."
        )
    said = (str(error).strip().splitlines() or [""])[0]
    if status in (401, 403):
        return DownloadError(
            f"{request.asked}: the Hub refuses access ({status}). HF_TOKEN is wrong, expired or may not read "
            f"it: create another token on the Hub, or unset it. It said: {said}"
        )
    if status is not None:
        return DownloadError(
            f"{request.asked}: the Hub answered with status {status}. Try again later. It said: {said}"
        )
    return DownloadError(
        f"{request.asked} could not be downloaded: {constants.ENDPOINT} cannot be reached. Check the "
        "network, the proxy and HF_ENDPOINT, and try again; what the Hub's cache holds already is used with "
        f"HF_HUB_OFFLINE=1. ({type(error).__name__}: {said})"
    )
