"""Numbers as a person reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.results import LLAMA, a_device, a_model, a_quality, a_result
from pocketlm_benchmarks.reports.formatting import (
    headlines,
    kl_of,
    label,
    minutes,
    number,
    of_summary,
    per_second,
    spread,
    title,
)
from pocketlm_benchmarks.reports.layout import EMPTY, Cell, plain
from pocketlm_benchmarks.reports.setting import device_table
from pocketlm_benchmarks.result import OURS, Case


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00042, "0.000420"),
        (0.0108, "0.0108"),
        (0.99951, "1.00"),
        (9.996, "10.0"),
        (89.12, "89.1"),
        (753.4, "753"),
        (12745.0, "12,745"),
        (-3.456, "−3.46"),
    ],
)
def test_three_significant_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


def test_an_interval_is_as_precise_as_its_value() -> None:
    assert spread(753.2, 740.4, 765.5) == Cell("753", "740–766")
    assert spread(0.0112, 0.0109, 0.0121, scale=1000) == Cell("11.2", "10.9–12.1")
    assert spread(0.5, -0.1, 1.25) == Cell("0.500", "−0.100 to 1.250")
    assert spread(1.5, None, None, unit="×") == Cell("1.50×")
    assert plain(Cell("1.50×", "1.40–1.60")) == "1.50× (1.40–1.60)"
    assert of_summary(None, "ttft_s") == EMPTY


def test_units() -> None:
    assert per_second(14.2e9, "B") == "14.2 GB/s"
    assert per_second(1.214e12, "OP") == "1.21 TOP/s"
    assert per_second(12, "B") == "12.0 B/s"
    assert [minutes(s) for s in (45, 60, 754.2)] == ["45 s", "1 min", "12 min 34 s"]


def test_names() -> None:
    result = a_result()
    ours, llama, _, openvino = result.engines
    assert title(result) == "smollm2-135m int8"
    assert [label(e) for e in (ours, llama, openvino)] == ["pocketlm int8", "llama.cpp Q8_0", "openvino"]
    assert label(replace(llama, name="llama.cpp Q8_0")) == "llama.cpp Q8_0"


def test_quality_is_ours_only_and_the_runs_own_goes_first() -> None:
    result = a_result()
    assert (kl_of(result, OURS), kl_of(result, LLAMA)) == ("0.0108", "–")
    measured = replace(a_model(), quality_measured=a_quality(0.02))
    assert kl_of(a_result(model=measured), OURS) == "0.0200"
    assert kl_of(a_result(model=a_model(kl_mean=None)), OURS) == "–"


def test_many_queries_at_once_are_summed_up_by_their_throughput() -> None:
    alone = Case("chat", "workload", 60, 128, 1, "a" * 64)
    assert headlines(alone)[0] == "e2el_s"
    assert headlines(replace(alone, concurrent=8))[0] == "throughput_tokens_per_s"


def test_a_device_tells_what_it_knows() -> None:
    rows = {row[0].text: row[1].text for row in device_table([a_device()]).rows}
    assert rows["Cores"] == "2 cores"
    assert rows["Machine"] == "virtual machine (kvm)"
    assert rows["Frequency"] == rows["Power"] == "–"
    other = replace(
        a_device(),
        physical_cores=1,
        virtual_machine=None,
        governor="powersave",
        turbo=False,
        power_source="mains",
    )
    rows = {row[0].text: row[1].text for row in device_table([other, replace(other, turbo=True)]).rows}
    assert rows["Cores"] == "1 core, 2 hardware threads"
    assert rows["Machine"] == "bare metal"
    assert rows["Frequency"] == "powersave, turbo off; powersave, turbo on"
