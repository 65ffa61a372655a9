"""The engines that can be measured beside ours, and how `--against` names them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pocketlm.errors import InvalidSettingError, did_you_mean
from pocketlm_benchmarks.engines.http_json import parse_url
from pocketlm_benchmarks.result import OURS

SERVER = "server"


@dataclass(frozen=True)
class Adapter:
    """Which class speaks to an engine, and what it takes for weights."""

    target: str  # "module:Class"
    takes: Literal["file", "folder", "path", "url"]
    weights: str  # the same for a person


@dataclass(frozen=True)
class PeerSpec:
    """A peer and its weights: a path, or the URL of a server (with #MODEL behind it, or not)."""

    kind: str
    weights: str


def _adapter(target: str, takes: Literal["file", "folder", "path", "url"], weights: str) -> Adapter:
    return Adapter(f"pocketlm_benchmarks.engines.{target}", takes, weights)


ADAPTERS: dict[str, Adapter] = {
    OURS: _adapter("pocketlm_engine:PocketlmEngine", "folder", "a bundle folder"),
    "llama.cpp": _adapter("llama_cpp:LlamaCpp", "file", "a GGUF file"),
    "llama-bench": _adapter("llama_bench:LlamaBench", "file", "a GGUF file"),
    "onnxruntime-genai": _adapter(
        "onnxruntime_genai:OnnxRuntimeGenAI", "folder", "a folder that its model builder made"
    ),
    "openvino": _adapter("openvino_genai:OpenVINOGenAI", "path", "an OpenVINO model folder or a GGUF file"),
    "transformers": _adapter(
        "transformers_engine:Transformers", "path", "a checkpoint folder or a GGUF file"
    ),
    "optimum": _adapter("optimum_engine:OptimumORT", "folder", "a checkpoint folder or an exported one"),
    SERVER: _adapter("openai_server:OpenAIServer", "url", "the URL of an OpenAI-compatible server"),
}


def adapter_of(kind: str) -> str:
    """`"module:Class"` of an engine. Raises InvalidSettingError for a kind that is not known."""
    if kind not in ADAPTERS:
        raise InvalidSettingError(f"{kind!r} is no engine.{did_you_mean(kind, ADAPTERS)} Known: {_known()}.")
    return ADAPTERS[kind].target


def parse_against(text: str) -> list[PeerSpec]:
    """The peers of `--against`: `KIND=WEIGHTS`, separated by commas; a URL alone is a server.

    >>> parse_against("http://127.0.0.1:8080/v1#smollm2")
    [PeerSpec(kind='server', weights='http://127.0.0.1:8080/v1#smollm2')]

    Raises InvalidSettingError for a kind that is not known and for weights that are not there.
    """
    return [_peer(item) for item in split_peers(text)]


def split_peers(text: str) -> list[str]:
    """The items of `--against`. Only commas before a kind or a URL separate: file names hold some too."""
    return re.split(r",(?=[\w.-]*=|https?://)", text)


def _peer(item: str) -> PeerSpec:
    if item.startswith(("http://", "https://")):
        return _checked(SERVER, item)
    kind, separator, weights = item.partition("=")
    if kind == OURS or kind not in ADAPTERS:
        known = [name for name in ADAPTERS if name != OURS]
        raise InvalidSettingError(
            f"--against names {kind!r}, which is no known peer.{did_you_mean(kind, known)} Known: {_known()}."
        )
    if not separator or not weights:
        raise InvalidSettingError(f"--against {kind} lacks its weights: {kind}={ADAPTERS[kind].weights}.")
    return _checked(kind, weights)


def _checked(kind: str, weights: str) -> PeerSpec:
    adapter = ADAPTERS[kind]
    if adapter.takes == "url":
        try:
            parse_url(weights)
        except ValueError as error:
            raise InvalidSettingError(f"--against {kind}: {error}, with #MODEL behind it or not.") from None
        return PeerSpec(kind, weights)
    path = Path(weights).expanduser()
    if not path.exists():
        raise InvalidSettingError(f"--against {kind}: {path} does not exist; {adapter.weights} is expected.")
    is_wrong = path.is_dir() if adapter.takes == "file" else adapter.takes == "folder" and not path.is_dir()
    if is_wrong:
        came = "a folder" if path.is_dir() else "a file"
        raise InvalidSettingError(f"--against {kind}: {path} is {came}; {adapter.weights} is expected.")
    return PeerSpec(kind, str(path))


def _known() -> str:
    return ", ".join(name for name in ADAPTERS if name != OURS)
