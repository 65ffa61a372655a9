"""The benchmark of grammars: each of its answers follows its schema, and the table says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from helpers.tiny import END_OF_TEXT, VOCABULARY, tokenizer_json
from pocketlm.constraint import ConstraintError, ConstraintFactory
from pocketlm.manifest import Tokens
from pocketlm.tokenizer import Tokenizer
from pocketlm_benchmarks.constraint_cost import CASES, main, measure, report

TOKENIZER = Tokenizer(tokenizer_json(), None, Tokens(bos=None, eos=(END_OF_TEXT,), add_bos=False))
FACTORY = ConstraintFactory(TOKENIZER, VOCABULARY, [END_OF_TEXT])


@pytest.mark.parametrize("name", CASES)
def test_each_answer_is_walked_to_its_end(name: str) -> None:
    costs = measure(FACTORY, TOKENIZER, VOCABULARY, *CASES[name], rounds=2)
    assert costs.tokens > 10
    for seconds in (costs.mask_s, costs.accept_s, costs.forced_s):
        assert len(seconds) == 2 * costs.tokens
        assert min(seconds) > 0
    assert costs.first_mask_s == max(costs.mask_s[: costs.tokens])


def test_an_answer_that_the_schema_forbids() -> None:
    with pytest.raises(ConstraintError):
        measure(FACTORY, TOKENIZER, VOCABULARY, {"type": "integer"}, "text", rounds=1)


def test_a_report_of_a_bundle(int8_bundle: Path) -> None:
    lines = report(int8_bundle, rounds=1).splitlines()
    assert lines[0].startswith(f"tiny: {VOCABULARY:,} logits; prepare, once: ")
    assert [line[:12].strip() for line in lines[2:]] == list(CASES)


def test_an_error_has_no_traceback(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
