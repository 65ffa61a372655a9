"""What could use the network, and what keeps it from doing so."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator

from pocketlm.doctor.check import Check

_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its variables
_PATHS = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT")


def telemetry() -> Iterator[Check]:
    """ONNX Runtime's; pocketlm has none."""
    import pocketlm.session  # noqa: F401  (what sets the variable)

    value = os.environ.get("ORT_DISABLE_TELEMETRY")
    yield Check(
        "telemetry",
        "ok" if value == "1" else "problem",
        "off: pocketlm has none, and switches ONNX Runtime's off before loading it"
        if value == "1"
        else f"ONNX Runtime's is on: ORT_DISABLE_TELEMETRY is {value!r}, 1 is expected",
        facts={"ORT_DISABLE_TELEMETRY": value},
    )


def hub() -> Iterator[Check]:
    """Whether the Hugging Face Hub may be asked, and how. A token is mentioned, never shown."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    token = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"))
    others = {name: _without_password(value) for name in _PATHS if (value := os.environ.get(name))}
    text = (
        "HF_HUB_OFFLINE is set: nothing is fetched from the Hugging Face Hub"
        if offline
        else "the Hugging Face Hub is asked only for models that are not here"
    )
    if token:
        text += "; a token is set"
    yield Check(
        "hub",
        "ok",
        text + "".join(f"; {name} is {value}" for name, value in others.items()),
        facts={"offline": offline, "token": token, **others},
    )


def proxies() -> Iterator[Check]:
    """What downloads go through: the environment's, on macOS and Windows the system's."""
    found = {name: _without_password(value) for name, value in urllib.request.getproxies().items()}
    shown = [f"{name} through {value}" for name, value in found.items() if name != "no"]
    text = f"downloads of {', '.join(shown)}" if shown else "none: downloads go straight to their servers"
    if shown and "no" in found:
        text += f", but for {found['no']}"
    yield Check("proxies", "ok", text, facts={"proxies": found})


def _without_password(value: str) -> str:
    """An address without the user's name and password in it."""
    scheme, separator, rest = value.rpartition("://")
    authority, slash, path = rest.partition("/")
    return scheme + separator + authority.rpartition("@")[2] + slash + path
