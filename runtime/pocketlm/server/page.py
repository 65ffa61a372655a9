"""The chat page: a fixed list of files, read once. No part of a request's path reaches the file system."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

NAMES = (
    "index.html",
    "favicon.svg",
    "page.css",
    "answer.css",
    "panels.css",
    "theme.js",
    "main.js",
    "api.js",
    "app.js",
    "composer.js",
    "conversation.js",
    "dialogs.js",
    "dom.js",
    "figures.js",
    "markdown.js",
    "message.js",
    "models.js",
    "notices.js",
    "run.js",
    "settings.js",
    "sidebar.js",
    "store.js",
    "thread.js",
    "vendor/marked.esm.js",
)

_CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""Nothing is loaded from elsewhere, and no text can become code: not even a bug in the page's Markdown could
run what a model writes."""

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered by 304
}


def _path(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


PATHS = frozenset(_path(name) for name in NAMES)
"""What can be had without an API key: the page asks for one itself, and holds nothing secret."""


@dataclass(frozen=True)
class _File:
    content: bytes
    content_type: str
    etag: str

    @classmethod
    def read(cls, name: str) -> _File:
        content = resources.files(__package__).joinpath("page", *name.split("/")).read_bytes()
        content_type = _CONTENT_TYPES[name.rsplit(".", 1)[1]]
        return cls(content, content_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.etag}
        known = {
            each.strip().removeprefix("W/") for each in request.headers.get("If-None-Match", "").split(",")
        }
        if self.etag in known:
            return Response(status_code=304, headers=headers)
        # Set as it is: `media_type` would name a charset for an image too.
        return Response(self.content, headers={**headers, "Content-Type": self.content_type})


def routes() -> APIRouter:
    """The page at `/`, its parts below `/page/`. Raises FileNotFoundError if the installation lacks one."""
    router = APIRouter(include_in_schema=False)
    for name in NAMES:
        router.add_route(_path(name), _File.read(name).answer, methods=["GET", "HEAD"])
    return router
