"""A model as Ollama's API describes it. All of it comes from the bundle; no weights are needed."""

from __future__ import annotations

from typing import Any

from pocketlm.manifest import Manifest
from pocketlm.server.model_store import ModelState, ServedModel
from pocketlm.server.ollama.times import timestamp
from pocketlm.tools import tool_format


def tagged(served: ServedModel) -> dict[str, Any]:
    """An entry of `/api/tags`."""
    return {
        **_named(served),
        "modified_at": timestamp(served.modified_at),
        "size": served.manifest.bytes,
    }


def loaded(state: ModelState) -> dict[str, Any]:
    """An entry of `/api/ps`. `size` is what the model may grow to in memory, in bytes; without `expires_at`
    it is in use or stays for ever. `running` and `waiting` count requests, and are pocketlm's own."""
    return {
        **_named(state.served),
        "size": state.memory_bytes,
        "size_vram": 0,
        "expires_at": None if state.expires_at is None else timestamp(state.expires_at),
        "context_length": state.context_length,
        "running": state.running,
        "waiting": state.waiting,
    }


def shown(state: ModelState, chat_template: str | None) -> dict[str, Any]:
    """The answer of `/api/show`. The template is Jinja's."""
    manifest = state.served.manifest
    parameters = {"num_ctx": state.context_length, "temperature": 0}
    return {
        "modelfile": "".join(
            f"{line}\n"
            for line in (
                f"FROM {state.served.name}",
                *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
            )
        ),
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in parameters.items()),
        "template": chat_template or "",
        "license": manifest.licence or "",
        "details": details(manifest),
        "model_info": _model_info(manifest),
        "capabilities": _capabilities(manifest, chat_template),
        "modified_at": timestamp(state.served.modified_at),
    }


def details(manifest: Manifest) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "onnx",
        "family": manifest.family,
        "families": [manifest.family],
        "parameter_size": "" if manifest.parameters is None else _readable(manifest.parameters),
        "quantization_level": manifest.precision.name,
    }


def _named(served: ServedModel) -> dict[str, Any]:
    manifest = served.manifest
    return {
        "name": served.name,
        "model": served.name,
        "digest": manifest.digest(),
        "details": details(manifest),
    }


def _readable(count: int) -> str:
    """ "135M", "1.1B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.1f}{unit}" if unit == "B" else f"{value:.0f}{unit}"
    return str(count)


def _model_info(manifest: Manifest) -> dict[str, Any]:
    family, of = manifest.family, manifest.dimensions
    own = {
        "context_length": of.context_length,
        "embedding_length": of.hidden,
        "block_count": of.layers,
        "feed_forward_length": of.intermediate,
        "attention.head_count": of.heads,
        "attention.head_count_kv": of.kv_heads,
        "attention.key_length": of.head_dim,
        "vocab_size": of.vocabulary,
    }
    return {
        "general.architecture": family,
        "general.basename": manifest.name,
        "general.parameter_count": manifest.parameters,
        **{f"{family}.{name}": value for name, value in own.items()},
    }


def _capabilities(manifest: Manifest, chat_template: str | None) -> list[str]:
    found = ["completion"]
    if tool_format(chat_template) is not None:
        found.append("tools")
    if manifest.graph.hidden is not None:
        found.append("embedding")
    return found
