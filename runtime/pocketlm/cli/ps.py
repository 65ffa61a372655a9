"""`pocketlm ps`: the models that a running server has loaded."""

from __future__ import annotations

import json
import math
import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from pocketlm.cli import console
from pocketlm.cli import serve as serving
from pocketlm.errors import InvalidSettingError, PocketlmError
from pocketlm.files import readable_size

if TYPE_CHECKING:
    from email.message import Message
    from http.client import HTTPResponse
    from urllib.request import Request

TIMEOUT_S = 10.0
"""For each answer of the network: a server that computes still answers this at once."""

_LARGEST_ANSWER = 1 << 24  # bytes
_FOR_EVER_S = 50 * 365 * 86400
"""Ollama's servers say "for ever" with a date centuries away."""


def ps(
    *,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="POCKETLM_URL",
            help="Where the server listens (default: http://127.0.0.1:8642, or what POCKETLM_HOST and "
            "POCKETLM_PORT say).",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="POCKETLM_API_KEY_FILE",
            help="The server's key, if it asks for one; POCKETLM_API_KEY holds it too.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's own answer.")] = False,
) -> None:
    """List the models that a running server has loaded."""
    url = _checked(url) if url is not None else _default_url()
    answer = _ask(url, _key(api_key_file))
    models = _models(url, answer)
    if as_json:
        console.write_json(answer)
    elif models:
        _print(models)
    else:
        console.note(f"The server at {url} has no model loaded; it loads one when it is asked for it.")


def _default_url() -> str:
    # What `pocketlm serve` in the same environment listens on.
    host = os.environ.get("POCKETLM_HOST") or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    port = os.environ.get("POCKETLM_PORT") or "8642"
    return _checked(f"http://{f'[{host}]' if ':' in host else host}:{port}")


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and "@" not in url
    except ValueError:  # a port that is no number, a bracket that is not closed
        sound = False
    if not sound or any(character <= " " for character in url):
        raise InvalidSettingError(
            f"{url!r} is no server's address; one as http://127.0.0.1:8642 is expected."
        )
    return url.rstrip("/")


def _key(path: Path | None) -> str | None:
    if path is not None:
        return serving.read_keys(path)[0]
    return os.environ.get("POCKETLM_API_KEY", "").strip() or None


def _ask(url: str, key: str | None) -> Any:
    """The server's JSON. Raises PocketlmError if there is none."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

    class NoRedirect(HTTPRedirectHandler):
        """The key is for nobody else."""

        def redirect_request(
            self, req: Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
        ) -> None:
            return None

    headers = {"Accept": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    # A proxy for the web is not for servers on this machine or beside it.
    opener = build_opener(ProxyHandler({}), NoRedirect())
    try:
        response: HTTPResponse
        with opener.open(Request(f"{url}/api/ps", headers=headers), timeout=TIMEOUT_S) as response:
            return json.loads(response.read(_LARGEST_ANSWER))
    except HTTPError as error:
        with error:
            raise PocketlmError(_refusal(url, error.code, key)) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PocketlmError(
            f"no server answers at {url} ({getattr(reason, 'strerror', None) or reason}). Start one with "
            "pocketlm serve MODEL, or say with --url where it is."
        ) from None
    except (ValueError, RecursionError):
        raise PocketlmError(_stranger(url)) from None


def _refusal(url: str, status: int, key: str | None) -> str:
    if status == 401:
        given = "another API key than the given one" if key else "an API key"
        return f"the server at {url} wants {given}. Set POCKETLM_API_KEY, or give --api-key-file FILE."
    if status == 404 or status < 400:
        return _stranger(url)
    if status == 503:
        return (
            f"the server at {url} is not ready: it fetches or loads its first model, or ends. Try again soon."
        )
    return f"the server at {url} answered with status {status}. Its log says more."


def _stranger(url: str) -> str:
    return f"what answers at {url} is not a server of pocketlm. Say with --url where it is."


def _models(url: str, answer: Any) -> list[dict[str, Any]]:
    models = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise PocketlmError(_stranger(url))
    return models


def _print(models: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("MODEL", "PRECISION", "MEMORY UP TO", "CONTEXT", "RUNNING", "WAITING", "UNTIL"):
        number = heading not in ("MODEL", "PRECISION", "UNTIL")
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for model in models:
        table.add_row(*(Text(console.printable(cell)) for cell in _row(model)))
    console.out().print(table)


def _row(model: dict[str, Any]) -> list[str]:
    details = model.get("details")
    precision = details.get("quantization_level") if isinstance(details, dict) else None
    size = model.get("size")
    return [
        str(model.get("name", "–")),
        str(precision or "–"),
        readable_size(size) if isinstance(size, int) else "–",
        *(_number(model.get(name)) for name in ("context_length", "running", "waiting")),
        _until(model.get("expires_at"), in_use=bool(model.get("running"))),
    ]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _until(expires_at: Any, *, in_use: bool) -> str:
    """How long an idle model stays, as far as the server says."""
    if in_use:
        return "in use"
    try:
        left_s = datetime.fromisoformat(expires_at).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):  # none, or none that can be read
        left_s = math.inf
    if left_s > _FOR_EVER_S:
        return "–"
    if left_s < 90:
        return f"{max(0, left_s):.0f} s from now"
    return f"{left_s / 60:.0f} min from now" if left_s < 5400 else f"{left_s / 3600:.0f} h from now"
