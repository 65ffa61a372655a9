"""What a grammar costs each token: `python -m pocketlm_benchmarks.constraint_cost BUNDLE`.

Walks answers through their schemas, token by token as an engine does, without a model:

compile   the grammar's check and its compilation for this tokenizer, before the first token
mask      which tokens may come next, applied to a row of logits
accept    the parser goes on by one token
forced    the tokens that are the only way on

`prepare` comes once for a model: the tokenizer's bytes in a tree. The first round of an answer also builds
the automata of its grammar as it goes, so its slowest mask stands beside the median and the 99th percentile
of all rounds. Beside a decode step of the same model and machine, mask + accept are what a grammar costs.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from pocketlm.bundle import open_bundle
from pocketlm.constraint import ConstraintFactory, Grammar
from pocketlm.errors import PocketlmError
from pocketlm.tokenizer import Tokenizer

T = TypeVar("T")

_TEXT: dict[str, Any] = {"type": "string"}
_ITEM = {
    "type": "object",
    "properties": {"name": _TEXT, "amount": {"type": "number"}, "unit": {"enum": ["g", "ml", "piece"]}},
    "required": ["name", "amount", "unit"],
}
_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"tag": _TEXT, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["tag"],
        }
    },
}
_STORY = (
    'The lighthouse keeper, Zoë, wrote "still no ship" in her log every evening; then one day the fog '
    "lifted and the whole bay was full of sails. She counted them twice, and lit the lamp at noon."
)

CASES: dict[str, tuple[Any, Any]] = {
    "person": (
        {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "born": {"type": "string", "format": "date"},
                "email": {"type": "string", "format": "email"},
                "hobbies": {"type": "array", "items": _TEXT, "maxItems": 10},
            },
            "required": ["name", "born", "email", "hobbies"],
        },
        {
            "name": "María Gómez",
            "born": "1990-02-28",
            "email": "maria.gomez@example.com",
            "hobbies": ["chess", "hiking in the mountains", "jazz"],
        },
    ),
    "recipe": (
        {
            "type": "object",
            "properties": {
                "title": _TEXT,
                "ingredients": {"type": "array", "items": _ITEM},
                "minutes": {"type": "integer", "minimum": 1, "maximum": 600},
            },
            "required": ["title", "ingredients", "minutes"],
        },
        {
            "title": "Pancakes",
            "ingredients": [
                {"name": "flour", "amount": 250, "unit": "g"},
                {"name": "milk", "amount": 500.5, "unit": "ml"},
                {"name": "eggs", "amount": 3, "unit": "piece"},
            ],
            "minutes": 25,
        },
    ),
    "any JSON": ({}, {"a": [1, -2.5e-3, None, True], "b": {"nested": {"deep": ["x", "y\n"]}}, "c": _STORY}),
    "long text": (
        {"type": "object", "properties": {"story": _TEXT}, "required": ["story"]},
        {"story": _STORY},
    ),
    "recursion": (
        _TREE,
        {"tag": "ul", "children": [{"tag": "li", "children": [{"tag": "b"}]}, {"tag": "li", "children": []}]},
    ),
    "300 choices": (
        {"enum": [f"option number {n} of many" for n in range(300)]},
        "option number 217 of many",
    ),
}


@dataclass
class Costs:
    """Seconds of each call, by what was called."""

    compile_s: float
    tokens: int
    mask_s: list[float] = field(default_factory=list)
    accept_s: list[float] = field(default_factory=list)
    forced_s: list[float] = field(default_factory=list)
    first_mask_s: float = 0.0  # the slowest of the first round


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often each answer is walked.")] = 20,
) -> None:
    """Measure what structured output costs per token."""
    try:
        typer.echo(report(bundle, rounds))
    except PocketlmError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


def report(folder: Path, rounds: int) -> str:
    """The table, in µs except for `compile`."""
    bundle = open_bundle(folder, verify=False)
    tokenizer = Tokenizer(bundle.tokenizer_json, bundle.chat_template, bundle.manifest.tokens)
    vocabulary = bundle.manifest.dimensions.vocabulary
    factory = ConstraintFactory(tokenizer, vocabulary, bundle.manifest.tokens.eos)
    _, prepare_s = _timed(lambda: factory.constraint(Grammar.choice(["a"])))
    lines = [
        f"{bundle.manifest.name}: {vocabulary:,} logits; prepare, once: {prepare_s:.2f} s; "
        f"rounds: {rounds}; in µs:",
        f"{'schema':12} {'compile ms':>10} {'tokens':>6} {'mask':>6} {'p99':>7} {'first':>7} "
        f"{'accept':>6} {'p99':>6} {'forced':>6} {'p99':>6}",
    ]
    for name, (schema, document) in CASES.items():
        costs = measure(factory, tokenizer, vocabulary, schema, document, rounds)
        columns = [f"{name:12} {costs.compile_s * 1e3:10.1f} {costs.tokens:6}"]
        columns.append(f"{_pair(costs.mask_s, 6, 7)} {costs.first_mask_s * 1e6:7.0f}")
        columns += [_pair(costs.accept_s, 6, 6), _pair(costs.forced_s, 6, 6)]
        lines.append(" ".join(columns))
    return "\n".join(lines)


def measure(
    factory: ConstraintFactory,
    tokenizer: Tokenizer,
    vocabulary: int,
    schema: Any,
    document: Any,
    rounds: int,
) -> Costs:
    """Walks `document` through `schema`, `rounds` times from the beginning.

    Raises ConstraintError if the schema does not allow it.
    """
    ids = tokenizer.encode(json.dumps(document, ensure_ascii=False), add_bos=False)
    begun, compile_s = _timed(lambda: factory.constraint(Grammar.json_schema(schema)))
    costs = Costs(compile_s, len(ids))
    source = np.random.default_rng(0).standard_normal(vocabulary).astype(np.float32)
    logits = np.empty_like(source)
    for _ in range(rounds):
        constraint = begun.fork()
        mask = functools.partial(constraint.mask, logits)
        for token_id in ids:
            np.copyto(logits, source)
            costs.mask_s.append(_timed(mask)[1])
            # Before it the parser would have had its answer ready for `mask`.
            costs.forced_s.append(_timed(constraint.forced)[1])
            costs.accept_s.append(_timed(functools.partial(constraint.accept, token_id))[1])
        costs.first_mask_s = costs.first_mask_s or max(costs.mask_s)
    return costs


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _pair(seconds: Sequence[float], *widths: int) -> str:
    """The median and the 99th percentile, in µs."""
    values = (statistics.median(seconds), float(np.percentile(seconds, 99)))
    return " ".join(f"{value * 1e6:{width}.0f}" for value, width in zip(values, widths, strict=True))


if __name__ == "__main__":
    typer.run(main)
