"""`--against`: which peers on which weights, and every mistake named."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.engines.registry import ADAPTERS, PeerSpec, adapter_of, parse_against


def test_kinds_name_modules_of_the_package() -> None:
    for kind in ADAPTERS:
        module, _, name = adapter_of(kind).partition(":")
        assert hasattr(importlib.import_module(module), name)


def test_parse(tmp_path: Path) -> None:
    gguf, folder = tmp_path / "a,b.gguf", tmp_path / "folder"
    gguf.touch()
    folder.mkdir()
    url = "http://127.0.0.1:8080/v1#a,model"
    assert parse_against(f"llama.cpp={gguf},openvino={folder},{url},server=https://example.org") == [
        PeerSpec("llama.cpp", str(gguf)),
        PeerSpec("openvino", str(folder)),
        PeerSpec("server", url),
        PeerSpec("server", "https://example.org"),
    ]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "x.gguf").touch()
    assert parse_against("llama-bench=~/x.gguf") == [PeerSpec("llama-bench", str(tmp_path / "x.gguf"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lama.cpp=x", r"'lama\.cpp', which is no known peer\. Did you mean llama\.cpp"),
        ("zzz=x", r"'zzz', which is no known peer\. Known: llama\.cpp, llama-bench"),
        ("pocketlm=x", "'pocketlm', which is no known peer"),
        ("", "'', which is no known peer"),
        ("llama.cpp", r"llama\.cpp lacks its weights: llama\.cpp=a GGUF file"),
        ("llama.cpp=", r"llama\.cpp lacks its weights"),
        ("llama.cpp=/nowhere.gguf", r"nowhere\.gguf does not exist; a GGUF file is expected"),
        ("llama.cpp={folder}", "is a folder; a GGUF file is expected"),
        ("optimum={file}", "is a file; a checkpoint folder or an exported one is expected"),
        ("server=127.0.0.1:8080", r"no URL of a server; for example http://127\.0\.0\.1:8080/v1"),
        ("http://", "no URL of a server"),
        ("http://[::1", "no URL of a server"),
        ("http://localhost:99999", "no URL of a server"),
    ],
)
def test_mistakes(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidSettingError, match=message):
        parse_against(text.format(folder=tmp_path, file=file))


def test_a_kind_that_is_not_known() -> None:
    with pytest.raises(InvalidSettingError, match=r"'pocketlmm' is no engine\. Did you mean pocketlm"):
        adapter_of("pocketlmm")
