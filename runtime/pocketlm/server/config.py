"""What the operator of a server has chosen, checked once."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass

from pocketlm.engine import DEFAULT_CACHE_BYTES
from pocketlm.errors import InvalidSettingError
from pocketlm.power import PowerMode

DEFAULT_PORT = 8642
"""Not one that other runtimes use: 8080, 11434, 1234 and 1337 are taken."""


_HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[?[0-9a-f:.]+\]?", re.IGNORECASE)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@*\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class ModelOptions:
    """Which models are served, and how they are loaded: see `pocketlm.load` and `ModelStore`."""

    names: tuple[str, ...] = ()  # none: all that are in the cache
    precision: str | None = None
    context_length: int | None = None
    threads: int | None = None
    power: PowerMode = "balanced"
    draft: str | None = None
    concurrency: int = 8
    queue_limit: int = 64
    cache_bytes: int = DEFAULT_CACHE_BYTES
    reproducible: bool = False
    budget_bytes: int | None = None  # None: what the machine has to spare
    keep_alive_s: float | None = 600.0  # None: for ever


@dataclass(frozen=True)
class ServerConfig:
    """Raises InvalidSettingError for a value out of range, and for an open address without an API key."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT  # 0: the system chooses
    api_keys: tuple[str, ...] = ()  # any of them lets a request in; none: no key is asked for
    allowed_hosts: tuple[str, ...] = ()  # in the Host header, beside the loopback's names and `host` itself
    allowed_origins: tuple[str, ...] = ()  # pages of these may call the server; "scheme://host[:port]"
    max_body_bytes: int = 4 << 20
    max_connections: int = 256
    max_tokens: int | None = None  # of one answer; None: what the context leaves
    max_answers: int = 16  # to one request (`n`, or texts to embed)
    body_timeout_s: float = 30.0  # for a request's head, and for its body
    answer_timeout_s: float | None = 600.0  # from the request to the end of its answer
    send_timeout_s: float = 60.0  # how long a client may not read
    drain_s: float = 30.0  # for answers under way after SIGTERM
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_body_bytes", 1), ("max_connections", 1), ("max_answers", 1)):
            _check(name, getattr(self, name), isinstance(getattr(self, name), int), least)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, isinstance(self.max_tokens, int), 1)
        for name in ("body_timeout_s", "answer_timeout_s", "send_timeout_s", "drain_s"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, isinstance(value, int | float) and math.isfinite(value), 0)
        if not 0 <= self.port < 1 << 16:
            raise InvalidSettingError(f"port is {self.port}; a number from 0 to 65535 is expected.")
        if any(not key.strip() for key in self.api_keys):
            raise InvalidSettingError("an API key is empty. Give one of several characters, or none at all.")
        for name in self.allowed_hosts:
            if not _HOST.fullmatch(name):
                raise InvalidSettingError(
                    f"the allowed host {name!r} is none. Give a name without scheme and port, as models.lan, "
                    "or *.lan for all names that end so."
                )
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidSettingError(
                    f"the allowed origin {origin!r} is none. Give scheme and host, and the port if it is not "
                    "the scheme's own, as https://app.example or http://localhost:3000, one by one."
                )
        if not self.loopback and not self.api_keys:
            raise InvalidSettingError(
                f"the address {self.host} can be reached from other machines, so an API key is needed: give "
                "--api-key-file FILE or set POCKETLM_API_KEY, or stay on 127.0.0.1."
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _check(name: str, value: object, right_type: bool, least: int) -> None:
    if not right_type or isinstance(value, bool) or not value >= least:  # type: ignore[operator]
        raise InvalidSettingError(f"{name} is {value!r}; a number from {least} on is expected.")
