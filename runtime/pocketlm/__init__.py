"""Small language models on the device in front of you.

>>> import pocketlm
>>> model = pocketlm.load("smollm2-135m")
>>> print(model.generate("Why is the sky blue?").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketlm.chat import Chat
    from pocketlm.constraint import Grammar
    from pocketlm.engine import Model, load
    from pocketlm.errors import PocketlmError
    from pocketlm.generate import Completion, Piece, Stream, Timings, Usage
    from pocketlm.sampling import Sampling
    from pocketlm.scheduler import QueueFullError
    from pocketlm.settings import Settings
    from pocketlm.tokenizer import Message
    from pocketlm.tools import ToolCall

__all__ = [
    "Chat",
    "Completion",
    "Grammar",
    "Message",
    "Model",
    "Piece",
    "PocketlmError",
    "QueueFullError",
    "Sampling",
    "Settings",
    "Stream",
    "Timings",
    "ToolCall",
    "Usage",
    "load",
]

_HOMES = {
    "chat": ("Chat",),
    "constraint": ("Grammar",),
    "engine": ("Model", "load"),
    "errors": ("PocketlmError",),
    "generate": ("Completion", "Piece", "Stream", "Timings", "Usage"),
    "sampling": ("Sampling",),
    "scheduler": ("QueueFullError",),
    "settings": ("Settings",),
    "tokenizer": ("Message",),
    "tools": ("ToolCall",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use, so that `pocketlm --help` does not wait for ONNX Runtime.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
