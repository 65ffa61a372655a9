"""What a caller may say about an answer, and how what cannot be is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from pocketlm.constraint import Grammar
from pocketlm.errors import InvalidSettingError
from pocketlm.sampling import Sampling
from pocketlm.settings import AnswerSettings, Settings


def test_the_defaults_are_those_of_the_dataclass() -> None:
    assert AnswerSettings.of({}) == AnswerSettings()
    assert AnswerSettings.of({}).sampling == Sampling()


def test_each_setting_has_its_place() -> None:
    given = {
        "max_tokens": 5,
        "min_tokens": 2,
        "stop": ["END"],
        "ignore_eos": True,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 1.0},
        "seed": 7,
        "overflow": "slide",
        "timeout_s": 1.5,
        "speculate": False,
        "cache_prompt": False,
    }
    settings = AnswerSettings.of(given)
    for name, value in given.items():
        holder = settings.sampling if hasattr(settings.sampling, name) else settings
        assert getattr(holder, name) == value


def test_none_of_them_is_forgotten() -> None:
    """What `Settings` names is what comes somewhere."""
    places = {each.name for kind in (Sampling, AnswerSettings) for each in dataclasses.fields(kind)}
    ways = {"logprobs", "json_schema", "regex"}  # they are said by top_logprobs and grammar
    assert set(Settings.__annotations__) - ways == places - {"sampling"}


@pytest.mark.parametrize(
    ("given", "top_logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"top_logprobs": 3}, 3),
    ],
)
def test_log_probabilities(given: dict[str, Any], top_logprobs: int | None) -> None:
    assert AnswerSettings.of(given).top_logprobs == top_logprobs


@pytest.mark.parametrize(("stop", "expected"), [(None, ()), ("END", "END"), (["a", "b"], ["a", "b"])])
def test_stop(stop: Any, expected: Any) -> None:
    assert AnswerSettings.of({"stop": stop}).stop == expected


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"json_schema": {"type": "object"}}, "json_schema"),
        ({"json_schema": '{"type": "object"}'}, "json_schema"),
        ({"json_schema": True}, "json_schema"),
        ({"regex": "[a-z]+"}, "regex"),
        ({"grammar": 'start: "yes" | "no"'}, "grammar"),
    ],
)
def test_a_grammar(given: dict[str, Any], kind: str) -> None:
    grammar = AnswerSettings.of(given).grammar
    assert grammar is not None
    assert grammar.kind == kind
    assert AnswerSettings.of(dict.fromkeys(given)).grammar is None


def test_a_grammar_that_is_built_already() -> None:
    grammar = Grammar.choice(["yes", "no"])
    assert AnswerSettings.of({"grammar": grammar}).grammar is grammar


def test_one_grammar_at_a_time() -> None:
    with pytest.raises(InvalidSettingError, match=r"json_schema and regex are given.*Leave the others out"):
        AnswerSettings.of({"json_schema": {}, "regex": "a"})


@pytest.mark.parametrize("value", [1, 5, None])
def test_numbers_of_tokens_that_can_be(value: Any) -> None:
    assert AnswerSettings.of({"max_tokens": value}).max_tokens == value


@pytest.mark.parametrize("value", [0.001, 5, np.float32(2.5), None])
def test_times_that_can_be(value: Any) -> None:
    assert AnswerSettings.of({"timeout_s": value}).timeout_s == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; a whole number from 1 on is expected"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"overflow": "cut"}, 'overflow is \'cut\'; "error" or "slide" is expected'),
        ({"timeout_s": 0}, "timeout_s is 0; a number of seconds above 0"),
        ({"timeout_s": -1.0}, r"timeout_s is -1\.0"),
        ({"timeout_s": math.inf}, "timeout_s is inf"),
        ({"timeout_s": math.nan}, "timeout_s is nan"),
        ({"timeout_s": True}, "timeout_s is True"),
        ({"timeout_s": "1"}, "timeout_s is '1'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"regex": "("}, "regex"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        AnswerSettings.of(given)


@pytest.mark.parametrize(
    ("name", "near"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("stops", "stop")]
)
def test_a_setting_that_there_is_not(name: str, near: str) -> None:
    with pytest.raises(InvalidSettingError, match=rf"no setting '{name}'.*{near}"):
        AnswerSettings.of({name: 1})
