"""Markdown and CSV of one result and of several."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

from helpers.results import LLAMA, OPENVINO, a_device, a_model, a_result, measured
from pocketlm_benchmarks.reports.markdown import to_markdown
from pocketlm_benchmarks.reports.table import COLUMNS, to_csv
from pocketlm_benchmarks.result import OURS, Result


def tables(text: str) -> list[list[list[str]]]:
    """Each table's rows as cells."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def rows(results: list[Result]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(results))))


def test_every_table_is_whole() -> None:
    found = tables(to_markdown([a_result()]))
    assert len(found) > 8
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
        assert all(re.fullmatch("---:?", cell) for cell in table[1])


def test_the_speed_table_has_a_row_for_a_case_and_a_column_for_an_engine() -> None:
    result = a_result()
    [table] = [t for t in tables(to_markdown([result])) if t[0][:2] == ["case", "what"]]
    assert table[0][2:5] == ["pocketlm int8", "llama.cpp Q8_0", "onnxruntime-genai int4"]
    assert table[2] == ["KL to fp32", "nats", "0.0108", "–", "–", "–", "–"]
    assert [row[0] for row in table[3:]] == [case.name for case in result.cases]
    ratio = next(r for r in result.ratios if (r.peer, r.case) == (LLAMA, "pp512"))
    assert table[3][5].startswith(f"{ratio.better.value:.2f}× (")
    assert table[-1][4] == "–"  # a case that a peer cannot do


def test_it_says_how_to_repeat_it() -> None:
    result = a_result()
    text = to_markdown([result])
    assert f"```sh\n{result.command}\n```" in text
    assert result.model.bundle_sha256 in text and result.model.weights_sha256 in text
    assert "10 rounds, seed 0, 2 threads, context 1,024" in text
    assert all(case.sha256[:12] in text for case in result.cases)


def test_results_of_one_device_share_its_section_and_an_overview() -> None:
    results = [a_result(), a_result(model=a_model(precision="fp32", kl_mean=0.0), faster=0.4)]
    results[1] = replace(results[1], device=replace(a_device(), thermal_throttles=3))
    text = to_markdown(results)
    assert text.count("## AMD EPYC 7B13") == 1
    [overview] = [t for t in tables(text) if "KL to fp32" in t[0]]
    assert [row[0] for row in overview[2:]] == ["smollm2-135m int8", "smollm2-135m fp32"]
    assert [row[2] for row in overview[2:]] == ["0.0108", "0.0000"]
    other = replace(results[1], device=replace(a_device(), processor="Cortex-A76"))
    text = to_markdown([results[0], other])
    assert re.findall("(?m)^## (.*)$", text) == ["AMD EPYC 7B13", "Cortex-A76"]


def test_no_results_give_a_heading_only() -> None:
    assert to_markdown([]) == "# Benchmarks\n"
    assert to_csv([]).splitlines() == [",".join(COLUMNS)]


def test_markup_in_a_result_is_only_text() -> None:
    name = "a|b `c` <img src=x> *d* _e_ f_g [h](i) &lt;\n# j"
    result = replace(a_result(model=replace(a_model(), name=name)), flags=["- # not a list", "1. nor this"])
    text = to_markdown([replace(result, command="run ```x\ny")])
    assert r"a\|b \`c\` \<img src=x\> \*d\* \_e\_ f_g \[h\](i) \&lt; # j int8" in text
    assert not re.search(r"(?<!\\)<", text)
    assert "\n- \\- # not a list\n- 1\\. nor this\n" in text
    assert "````sh\nrun ```x y\n````" in text
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}


def test_a_line_for_each_engine_case_and_metric() -> None:
    result = a_result()
    found = rows([result])
    chat = result.measurement(OURS, "chat")
    assert chat is not None and chat.energy is not None
    [ttft] = [r for r in found if (r["engine"], r["case"], r["metric"]) == (OURS, "chat", "ttft_s")]
    summary = chat.metrics["ttft_s"]
    assert float(ttft["median"]) == summary.median and float(ttft["low"]) == summary.low
    assert int(ttft["n"]) == summary.n
    assert (ttft["unit"], ttft["kl_mean"], ttft["energy_kind"]) == ("s", "0.0108", "")
    assert ttft["case_sha256"] == "d4" * 32
    assert ttft["bundle_sha256"] == result.model.bundle_sha256
    [joules] = [r for r in found if (r["engine"], r["case"], r["metric"]) == (OURS, "chat", "energy_j")]
    assert float(joules["high"]) == chat.energy.total_j.high
    assert joules["energy_kind"] == "estimated" and joules["energy_scope"] == "process"
    assert joules["energy_source"] == "estimate"
    keys = [(r["engine"], r["case"], r["metric"]) for r in found]
    assert len(keys) == len(set(keys))
    assert {r["unit"] for r in found if r["metric"].endswith("tokens_per_s")} == {"tok/s"}
    assert {r["metric"] for r in found if not r["case"] and r["engine"] == LLAMA} == {
        "load_warm_s",
        "weight_bytes",
        "memory_peak_bytes",
        "memory_anonymous_bytes",
        "memory_file_bytes",
    }


def test_a_peers_divergence_is_unknown_and_a_skipped_one_has_its_reason() -> None:
    found = rows([a_result(), a_result(energy=measured())])
    assert {r["kl_mean"] for r in found if r["engine"] == LLAMA} == {""}
    skipped = [r for r in found if r["engine"] == OPENVINO]
    assert [(r["metric"], r["skipped"]) for r in skipped] == [("", "not installed")] * 2
    assert {r["case"] for r in found if r["skipped"] == "it takes one query at a time"} == {"batch"}
    assert {r["energy_kind"] for r in found} == {"", "estimated", "measured"}
    assert {r["metric"] for r in found} >= {"mbu", "mfu", "sustained_last_over_first", "load_cold_s"}


def test_no_spreadsheet_runs_a_cell() -> None:
    [row, *_] = rows([a_result(model=replace(a_model(), name='=HYPERLINK("x")'))])
    assert row["model"] == '\'=HYPERLINK("x")'
