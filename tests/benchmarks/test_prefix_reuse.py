"""The benchmark of prefix reuse: it measures what it says, and notices wrong bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from helpers.tiny_bundle import tiny_manifest
from pocketlm.errors import InvalidSettingError
from pocketlm.kv_cache import KVCache
from pocketlm_benchmarks.prefix_reuse import DifferentError, main, measure, report, table


def test_every_way_on_a_real_graph(int8_bundle: Path) -> None:
    lines = report(int8_bundle, tokens=150, rounds=2, threads=1).splitlines()
    assert lines[0].startswith("150 tokens of tiny int8 ")
    assert lines[0].endswith("threads: 1, rounds: 2")
    assert [line.split()[0] for line in lines[2:]] == ["way", "prefill", "load", "restore", "fork"]
    assert lines[3].endswith(" 1.0")


def test_more_tokens_than_the_context(int8_bundle: Path) -> None:
    with pytest.raises(InvalidSettingError, match="513 tokens were asked for, but tiny was trained for 512"):
        report(int8_bundle, tokens=513, rounds=1)


def test_an_error_has_no_traceback(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 1
    assert f"Error: {tmp_path} is not a bundle" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_medians_and_ratios() -> None:
    lines = table({"prefill": [2.0, 1.0, 9.0], "load": [0.1, 0.05, 0.04]}).splitlines()
    assert lines[1].split() == ["prefill", "2,000.0", "1,000.0", "9,000.0", "1.0"]
    assert lines[2].split() == ["load", "50.0", "40.0", "100.0", "40.0"]


def test_the_ways_take_turns() -> None:
    seen: list[str] = []
    measure(
        {"a": lambda cache: seen.append("a"), "b": lambda cache: seen.append("b")},
        new_cache(),
        new_cache,
        rounds=2,
    )
    assert seen == ["a", "b", "a", "b"]


@pytest.mark.parametrize("wrong", ["ids", "settled", "values"])
def test_wrong_bits_are_noticed(wrong: str) -> None:
    source = new_cache()
    source.ids[:] = [1, 2]
    source.settled = 2

    def fill(cache: KVCache) -> None:
        cache.copy_from(source, 2)
        if wrong == "ids":
            cache.ids[0] = 9
        elif wrong == "settled":
            cache.settled = 1
        else:
            cache.buffer[-1, -1, 0, -1, 1, -1] += 1

    with pytest.raises(DifferentError, match="broken gave other keys and values"):
        measure({"broken": fill}, source, new_cache, rounds=1)


def new_cache() -> KVCache:
    return KVCache(tiny_manifest().dimensions, 8)
