"""A result on a terminal of 80 columns and in a pipe."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest

from helpers.results import NOISY, a_device, a_model, a_result, measured
from pocketlm_benchmarks.compare import compare
from pocketlm_benchmarks.reports.sections import flags
from pocketlm_benchmarks.reports.terminal import print_comparison, print_result
from pocketlm_benchmarks.result import OURS, Result


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        """What was written, without weights and colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.getvalue())


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Terminal:
    """Makes standard output a terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def piped(capsys: pytest.CaptureFixture[str], result: Result) -> str:
    print_result(result)
    return capsys.readouterr().out


def line_of(text: str, *words: str) -> str:
    """The only line that holds all words."""
    [line] = [line for line in text.splitlines() if all(word in line for word in words)]
    return line


def test_a_pipe_gets_everything_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    result = a_result()
    text = piped(capsys, result)
    assert "\x1b" not in text
    first = result.measurement(OURS, "pp512")
    assert first is not None
    line = line_of(text, "pp512, prefill tok/s", "pocketlm int8")
    assert "0.0108" in line  # no speed without what it cost
    assert f"{first.metrics['prefill_tokens_per_s'].median:.0f} (" in line
    assert "×" not in line
    assert "× (" in line_of(text, "pp512, prefill tok/s", "llama.cpp Q8_0")
    assert "codecarbon 1,234 J" in text
    assert "• openvino: not installed" in text
    assert "• onnxruntime-genai on batch: it takes one query at a time" in text
    assert result.physics is not None and result.physics.limits[0] in text
    assert result.command in text


def test_energy_says_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    text = piped(capsys, a_result())
    assert "Energy of a query (estimated, scope process, source estimate)" in text
    text = piped(capsys, a_result(energy=measured()))
    assert "Energy of a query (measured, scope package, source rapl)" in text
    result = a_result()
    energy = next(m.energy for m in result.measurements if (m.engine, m.case) == (OURS, "chat"))
    assert energy is not None
    reference = line_of(text, "a web search")
    assert f"{0.3 / energy.wh:.1f}" in reference and "2024" in reference and "EPRI" in reference


def test_no_energy_no_physics_no_load_no_quality(capsys: pytest.CaptureFixture[str]) -> None:
    full = a_result(model=a_model(kl_mean=None))
    bare = [replace(m, energy=None) for m in full.measurements]
    text = piped(capsys, replace(full, energy=None, physics=None, sustained=None, measurements=bare))
    assert "Energy was not measured." in text
    assert "KL to fp32 not measured" in text
    for absent in ("J per query", "web search", "limits", "Sustained"):
        assert absent not in text


def test_80_columns_hold_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch, 80)
    print_result(a_result())
    lines = [line.rstrip() for line in terminal.shown().splitlines()]
    assert max(map(len, lines)) <= 80
    start = lines.index("pp512, prefill tok/s")  # a line of its own, with the engines below
    ours, llama = lines[start + 1 : start + 3]
    assert ours.startswith("  pocketlm int8") and "0.0108" in ours and "–" in ours
    assert llama.startswith("  llama.cpp Q8_0") and "×" in llama
    heading = next(line for line in lines if "TTFT ms" in line)
    assert "E2EL s" in heading and "queries" not in heading  # optional, as are most intervals here


def test_a_wide_terminal_shows_what_a_narrow_one_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch, 220)
    print_result(a_result())
    text = terminal.shown()
    assert "queries" in line_of(text, "TTFT ms")
    assert text.count("pp512, prefill tok/s") == 1  # a case is named once


def test_control_characters_of_a_result_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch, 100)
    result = a_result(model=replace(a_model(), name="evil\x1b[31m[red]"), device=a_device())
    print_result(replace(result, flags=["\x07bell"]))
    assert "evil[31m[red] int8" in terminal.shown()
    assert "\x1b[31m" not in terminal.getvalue() and "\x07" not in terminal.getvalue()


def test_flags_say_where() -> None:
    found = flags(a_result())
    assert found[0] == "Other processes used 14 % of the processor."
    assert f"{NOISY} (chat llama.cpp)" in found
    assert "Idle power changed by 12 %. (in 14 measurements)" in found
    result = a_result()
    assert flags(replace(result, flags=[NOISY]))[0] == NOISY  # of the whole run: no place is named


def test_flags_that_differ_in_a_percentage_become_one() -> None:
    result = a_result()
    first, second, *others = result.measurements
    measurements = [
        replace(first, flags=["slowed down by 7% in all"]),
        replace(second, flags=["slowed down by 25% in all"]),
        *(replace(each, flags=[]) for each in others),
    ]
    where = f"{first.case} {first.engine}, {second.case} {second.engine}"
    assert f"slowed down by 7 to 25% in all ({where})" in flags(replace(result, measurements=measurements))


def test_a_comparison_ends_with_its_conclusion(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = a_result(), a_result(faster=0.8, seed=1)
    cases = [replace(case, sha256="9" * 64) if case.name == "batch" else case for case in after.cases]
    print_comparison(compare(before, replace(after, cases=cases), tolerance=0.05))
    text = capsys.readouterr().out
    line = line_of(text, "pp512", "prefill tok/s", "×")
    assert "regression" in line and "0.8" in line and "<0.001" in line
    assert "same" in line_of(text, "KL to fp32")
    assert "312.0 MB" in line_of(text, "peak memory")
    assert "• batch: the prompts differ" in text
    assert text.splitlines()[-1].startswith("13 regressions beyond 5 %: pp512 prefill tok/s, tg128 TPOT ms, ")
    assert text.splitlines()[-1].endswith(" and 10 more.")


def test_a_comparison_without_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    result = a_result()
    print_comparison(compare(result, result, tolerance=0.025))
    assert capsys.readouterr().out.splitlines()[-1] == "No regression beyond 2.5 %."


def test_a_comparison_of_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    result = a_result()
    other = [replace(case, sha256="9" * 64) for case in result.cases]
    print_comparison(compare(result, replace(result, cases=other), tolerance=0.05))
    assert capsys.readouterr().out.splitlines()[-1].startswith("No case could be compared")


def test_a_comparison_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch, 80)
    print_comparison(compare(a_result(), a_result(faster=0.8, seed=1), tolerance=0.05))
    assert max(map(len, terminal.shown().splitlines())) <= 80
