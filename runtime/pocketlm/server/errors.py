"""What a client is told when something is wrong: a status, and JSON in the shape that its API has.

OpenAI's is the shape of all but Ollama's paths, whose clients want a string. Anthropic's clients read
`type` beside it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from starlette.responses import Response

from pocketlm.constraint import ConstraintError
from pocketlm.errors import (
    ContextOverflowError,
    InvalidSettingError,
    MissingExtraError,
    PocketlmError,
    PromptError,
)
from pocketlm.scheduler import QueueFullError
from pocketlm.server.model_store import ModelTooLargeError, ModelUnavailableError, UnknownModelError
from pocketlm.session import NoHiddenStatesError

Shape = Literal["openai", "anthropic", "ollama"]

RETRY_AFTER_S = 1
"""For a full queue: answers of small models end within seconds."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "invalid_request_error",
    503: "overloaded_error",
}
_SETTING = re.compile(r"^(?:the )?([a-z_]+) (?:(?:is|names|are|has|at|of|does)\b|[\w.-]+: )")

_LONGEST_MESSAGE = 1000

_log = logging.getLogger("pocketlm.server")


class ApiError(Exception):
    """A request that is refused, or that failed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param` is the field that is to blame; `code` is for programs."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def api_error(error: Exception) -> ApiError:
    """Any error as what a client may know of it. One that nobody raised on purpose is logged and stays
    inside."""
    match error:
        case ApiError():
            return error
        case UnknownModelError():
            return ApiError(404, str(error), code="model_not_found", param="model")
        case ModelUnavailableError():
            headers = {"Retry-After": str(max(1, round(error.retry_after_s)))}
            return ApiError(503, str(error), code="model_unavailable", headers=headers)
        case ModelTooLargeError():
            return ApiError(503, str(error), code="model_too_large")
        case QueueFullError():
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            return ApiError(503, str(error), code="queue_full", headers=headers)
        case ContextOverflowError():
            return ApiError(400, _sentence(error), code="context_length_exceeded", param="messages")
        case InvalidSettingError() | PromptError() | ConstraintError():
            named = _SETTING.match(str(error))
            return ApiError(400, _sentence(error), code="invalid_value", param=named and named[1])
        case NoHiddenStatesError():
            return ApiError(400, _sentence(error), code="no_embeddings", param="model")
        case MissingExtraError():
            return ApiError(501, _sentence(error), code="not_installed")
        case PocketlmError():
            _log.error("%s", error)
            return ApiError(500, _sentence(error))
        case MemoryError():
            return ApiError(503, "There is not enough memory for this request.", headers={"Retry-After": "5"})
    _log.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "Something went wrong inside the server; its log says what.")


@contextmanager
def blaming(prompt: str, **fields: str) -> Iterator[None]:
    """Names the fields of a request that the engine knows by other names: that of the prompt, and by setting
    those that settings were made of."""
    try:
        yield
    except (PromptError, InvalidSettingError) as error:
        told = api_error(error)
        setting = _SETTING.match(str(error))
        told.param = (
            prompt if isinstance(error, PromptError) else setting and fields.get(setting[1], setting[1])
        )
        raise told from error
    except ApiError as told:
        told.param = fields.get(told.param, told.param) if told.param else None
        raise


def shape_of(path: str) -> Shape:
    """The API that a path belongs to."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def error_object(error: ApiError, shape: Shape) -> dict[str, Any]:
    """The body of the answer, or of the last event of one that had begun."""
    if shape == "ollama":  # the text is all there is
        named = error.param is None or error.param in error.message
        return {"error": error.message if named else f"{error.param}: {error.message}"}
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    if shape == "openai":
        return {"error": body}
    kind = "api_error" if error.type == "server_error" else error.type
    return {"type": "error", "error": {**body, "type": kind}}


def error_response(
    path: str,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer to a request to `path` that is refused."""
    return as_response(ApiError(status, message, code=code, param=param, headers=headers), path)


def as_response(error: ApiError, path: str) -> Response:
    text = json.dumps(error_object(error, shape_of(path)), ensure_ascii=False)
    content = text.encode(errors="replace")  # a field's name may hold half a surrogate pair
    return Response(content, error.status, error.headers, "application/json")


def _sentence(error: Exception) -> str:
    text = str(error)
    if len(text) > _LONGEST_MESSAGE:  # some name what came, however long it is
        text = f"{text[: _LONGEST_MESSAGE - 3]}..."
    return text[:1].upper() + text[1:] if not _SETTING.match(text) else text
