"""Errors as the clients of each API read them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pocketlm.constraint import ConstraintError
from pocketlm.errors import (
    BundleError,
    ContextOverflowError,
    InvalidSettingError,
    MissingExtraError,
    PromptError,
)
from pocketlm.scheduler import QueueFullError
from pocketlm.server.errors import ApiError, api_error, error_response
from pocketlm.server.fields import refused
from pocketlm.session import NoHiddenStatesError


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (ApiError(413, "Too large."), 413, None, None),
        (QueueFullError(64, 1), 503, "queue_full", None),
        (ContextOverflowError(5000, 2048), 400, "context_length_exceeded", "messages"),
        (InvalidSettingError("top_p is 3, expected a number from 0 to 1."), 400, "invalid_value", "top_p"),
        (PromptError("the chat template failed."), 400, "invalid_value", None),
        (ConstraintError("the grammar grew too complex."), 400, "invalid_value", None),
        (NoHiddenStatesError("tiny"), 400, "no_embeddings", "model"),
        (MissingExtraError("tools", "structured"), 501, "not_installed", None),
        (BundleError("weights are altered."), 500, None, None),
        (MemoryError(), 503, None, None),
    ],
)
def test_what_is_raised_becomes_a_status(
    error: Exception, status: int, code: str | None, param: str | None
) -> None:
    told = api_error(error)
    assert (told.status, told.code, told.param) == (status, code, param)
    assert told.message
    assert ("Retry-After" in told.headers) is (status == 503)


def test_both_numbers_of_an_overflow_are_told() -> None:
    message = api_error(ContextOverflowError(5000, 2048)).message
    assert "5,000" in message
    assert "2,048" in message


def test_a_bug_is_logged_and_stays_inside(caplog: pytest.LogCaptureFixture) -> None:
    told = api_error(ZeroDivisionError("secret detail"))
    assert told.status == 500
    assert "secret" not in told.message
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "/v1/chat/completions",
            {"error": {"message": "No.", "type": "not_found_error", "param": "model", "code": "gone"}},
        ),
        (
            "/v1/messages/count_tokens",
            {
                "type": "error",
                "error": {"message": "No.", "type": "not_found_error", "param": "model", "code": "gone"},
            },
        ),
        ("/api/chat", {"error": "model: No."}),
    ],
)
def test_shapes(path: str, expected: dict[str, Any]) -> None:
    response = error_response(path, 404, "No.", code="gone", param="model", headers={"Retry-After": "2"})
    assert response.status_code == 404
    assert response.headers["retry-after"] == "2"
    assert json.loads(bytes(response.body)) == expected


@pytest.mark.parametrize(
    ("error", "code", "param", "message"),
    [
        ({"type": "extra_forbidden", "loc": ("body", "audio"), "msg": "", "input": {}}, "unsupported_field",
         "audio", "The field 'audio' is not supported here"),
        ({"type": "missing", "loc": ("body",), "msg": "", "input": None}, "missing_field", None,
         "The body is missing"),
        ({"type": "json_invalid", "loc": ("body", 3), "msg": "odd", "input": {}}, "invalid_json", None,
         "The body is not JSON: odd at character 3."),
        ({"type": "int_type", "loc": ("body", "n"), "msg": "An integer is expected", "input": "x" * 999},
         "invalid_value", "n", "n is 'xxx"),
        ({"type": "int_type", "loc": ("body", "n"), "msg": "No", "input": 10**5000}, "invalid_value", "n",
         "n is a number of many digits. No."),
        ({"type": "int_type", "loc": ("body", "n"), "msg": "No", "input": [1, 2]}, "invalid_value", "n",
         "n is a list of 2. No."),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(
    error: dict[str, Any], code: str, param: str | None, message: str
) -> None:
    told = refused([error])
    assert (told.status, told.code, told.param) == (400, code, param)
    assert message in told.message
    assert len(told.message) < 200
