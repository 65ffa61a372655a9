"""What requests are made of: strict fields, and what is said of those that are wrong.

A field that an API knows and pocketlm does not support is declared with the one value that asks for nothing
(`Literal[False] | None`), or left out: either way another value is refused by its name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pocketlm.server.errors import ApiError

_LONGEST_SHOWN = 80
_MOST_ERRORS = 100


class Fields(BaseModel):
    """An object of a request. Numbers are numbers, texts are texts, and nothing else is in it."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _few_errors(cls, value: object, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Makes one error of a great many: a report of the millions that fit a body would take gigabytes."""
        try:
            return validate(value)
        except ValidationError as error:
            if error.error_count() <= _MOST_ERRORS:
                raise
            count = f"{error.error_count():,}"
            raise PydanticCustomError("wrong", "{count} things in it are wrong", {"count": count}) from None


class OpenFields(BaseModel):
    """An object that clients send back as they got it: what is not needed of it is left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


ModelName = Annotated[str, Field(max_length=256)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Stops = (
    Annotated[str, Field(max_length=1024)]
    | Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=16)]
)


def given(**settings: Any) -> dict[str, Any]:
    """The settings that have a value."""
    return {name: value for name, value in settings.items() if value is not None}


def refused(errors: Sequence[Mapping[str, Any]], body: object = None) -> ApiError:
    """The first thing that pydantic found wrong with `body`, by its path. Where a value may be of several
    kinds, that is what is wrong with it as the kind that it fits best."""
    error = max(errors, key=lambda each: len(each["loc"]))
    path = [part for part in error["loc"] if part != "body"]
    if isinstance(body, Mapping):
        path = _keys(path, body, missing=error["type"] == "missing")
    param = ".".join(map(str, path)) or None
    match error["type"]:
        case "json_invalid":
            problem, place = error.get("ctx", {}).get("error", error["msg"]), path[-1] if path else 0
            return ApiError(
                400, f"The body is not JSON: {problem} at character {place}.", code="invalid_json"
            )
        case "extra_forbidden":
            message = f"The field {param!r} is not supported here. Leave it out."
            return ApiError(400, message, code="unsupported_field", param=param)
        case "none_required":
            message = f"The field {param!r} is not supported here. Leave it out, or null."
            return ApiError(400, message, code="unsupported_field", param=param)
        case "missing":
            what = f"The field {param!r} is missing" if param else "The body is missing"
            return ApiError(400, f"{what}.", code="missing_field", param=param)
    came = _short(error.get("input"))
    message = f"{param or 'the body'} is {came}. {error['msg']}."
    return ApiError(400, message, code="invalid_value", param=param)


def _keys(path: Sequence[Any], value: object, *, missing: bool) -> list[Any]:
    """`path` without the names of kinds, which pydantic puts between the keys. `missing`: the last key is not
    in `value`."""
    if not path:
        return []
    key, rest = path[0], path[1:]
    keys = _keys(rest, value, missing=missing)
    if missing and not rest and isinstance(value, Mapping):
        return [key]
    if (isinstance(value, Mapping) and key in value) or (isinstance(value, list) and isinstance(key, int)):
        inside = [key, *_keys(rest, value[key], missing=missing)]
        keys = max(keys, inside, key=lambda each: (each[-1:] == [path[-1]], len(each)))
    return keys


def _short(value: object) -> str:
    # Of something deep or large not even the text is made.
    if isinstance(value, Mapping | list):
        return "an object" if isinstance(value, Mapping) else f"a list of {len(value):,}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a number of many digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
