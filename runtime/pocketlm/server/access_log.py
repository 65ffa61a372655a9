"""What the server writes to its log: a line a request, without queries, headers and bodies."""

from __future__ import annotations

import logging
import sys
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG_LEVELS = ("debug", "info", "warning", "error")
ACCESS_LOGGER = "pocketlm.server.access"
PROMPTS_LOGGER = "pocketlm.server.prompts"

_PATH_LENGTH = 200

_log = logging.getLogger(ACCESS_LOGGER)


class AccessLog:
    """`127.0.0.1 POST /v1/chat/completions 200 1.234 s`, once the answer has ended or its client has gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        started_s, status, ended = time.monotonic(), "no answer", False

        async def watch(message: Message) -> None:
            nonlocal status, ended
            await send(message)
            if message["type"] == "http.response.start":
                status = str(message["status"])
            else:
                ended = not message.get("more_body", False)

        try:
            await self._app(scope, receive, watch)
        finally:
            client = scope["client"][0] if scope.get("client") else "-"
            broken = "" if ended else ", broken off"
            elapsed_s = time.monotonic() - started_s
            _log.info(
                "%s %s %s %s %.3f s%s", client, scope["method"], _path(scope), status, elapsed_s, broken
            )


def _path(scope: Scope) -> str:
    # As it came, still quoted: what a quoted newline stands for does not get into the log.
    return ascii((scope.get("raw_path") or scope["path"].encode())[:_PATH_LENGTH].decode("latin-1"))[1:-1]


class _CurrentStderr(logging.Handler):
    """Writes to the standard error of the moment: while progress bars are drawn, rich puts itself there and
    keeps a line from being written into them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def configure_logging(level: str) -> None:
    """Sends what the server has to say from `level` (of LOG_LEVELS) on to standard error."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    ours, uvicorn = logging.getLogger("pocketlm"), logging.getLogger("uvicorn")
    for logger in (ours, uvicorn):
        logger.handlers = [handler]
        logger.propagate = False
    ours.setLevel(level.upper())
    # Whoever asks for prompts gets them at any level.
    logging.getLogger(PROMPTS_LOGGER).setLevel(logging.INFO)
    # Its lesser remarks are about malformed requests, which anybody can send, and about its own start.
    uvicorn.setLevel(logging.DEBUG if level == "debug" else logging.ERROR)
