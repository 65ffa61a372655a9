"""The published schema is the one of the records, and it tells a result from anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from helpers.results import a_result
from pocketlm_benchmarks.result import json_schema, parse_result, to_json

SCHEMA = Path(__file__).parents[3] / "docs" / "bench-schema.json"


def test_the_published_schema_is_made_from_the_records() -> None:
    """After a change of result.py: json.dumps(json_schema(), indent=2, ensure_ascii=False) and a newline."""
    expected = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    assert SCHEMA.read_text(encoding="utf-8") == expected


def test_a_result_follows_the_schema_and_comes_back() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    result = a_result()
    data = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert list(Draft202012Validator(schema).iter_errors(data)) == []
    assert parse_result(data, where="here") == result


def drop_device(data: dict[str, Any]) -> None:
    del data["device"]


def unknown_key(data: dict[str, Any]) -> None:
    data["engines"][0]["speed"] = 1


def text_for_a_number(data: dict[str, Any]) -> None:
    data["measurements"][0]["metrics"]["prefill_tokens_per_s"]["median"] = "fast"


def other_version(data: dict[str, Any]) -> None:
    data["format_version"] = 2


@pytest.mark.parametrize("damage", [drop_device, unknown_key, text_for_a_number, other_version])
def test_a_broken_result_does_not(damage: Callable[[dict[str, Any]], None]) -> None:
    data = to_json(a_result())
    damage(data)
    assert not Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).is_valid(data)
