"""The page: self-contained, escaped, whole; its plots show what they were given and invent nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from helpers.results import LLAMA, ORT_GENAI, a_device, a_load, a_model, a_result, measured
from pocketlm_benchmarks.reports.frontier import frontier_plots
from pocketlm_benchmarks.reports.html import to_html
from pocketlm_benchmarks.reports.plots import (
    energy_plot,
    latency_plot,
    ratio_plot,
    result_plots,
    sustained_plot,
)
from pocketlm_benchmarks.reports.svg import Drawing, Scale, tick_text
from pocketlm_benchmarks.result import OURS, Result

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes; raises ValueError where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        if self._open:
            raise ValueError(f"not closed: {self._open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open.pop() != tag:
            raise ValueError(f"closed by {tag}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def several() -> list[Result]:
    return [
        a_result(),
        a_result(model=a_model(precision="fp32", kl_mean=-1e-9), faster=0.4),
        a_result(model=a_model(precision="int4", kl_mean=None)),
    ]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def test_the_page_needs_nothing_from_anywhere_and_forbids_scripts() -> None:
    text = to_html(several())
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form", "image", "use"}
    for _, attributes in page.elements:
        assert not {"src", "style", "xlink:href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    [style] = re.findall("<style>(.*?)</style>", text, re.S)
    assert "url(" not in style and "@import" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    [policy] = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == (f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")


def test_each_result_is_reachable_and_each_table_and_plot_has_a_name() -> None:
    page = Page(to_html(several()))
    anchors = [(a["href"] or "")[1:] for a in page.all("a")]
    assert anchors == [article["id"] for article in page.all("article")] == ["run-0", "run-1", "run-2"]
    assert len(page.all("caption")) == len(page.all("table")) > 30
    plots = page.all("svg")
    assert len(plots) == 2 + 3 * 5
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)


def test_markup_in_a_result_is_only_text() -> None:
    evil = "<script>alert(1)</script>\"'&"
    result = a_result(model=replace(a_model(), name=evil), device=replace(a_device(), processor=evil))
    engines = [replace(e, name=evil) if e.name == LLAMA else e for e in result.engines]
    found = [replace(m, engine=evil) if m.engine == LLAMA else m for m in result.measurements]
    ratios = [replace(r, peer=evil) if r.peer == LLAMA else r for r in result.ratios]
    text = to_html([replace(result, engines=engines, measurements=found, ratios=ratios, flags=[evil])])
    assert not Page(text).all("script")
    assert text.count("&lt;script&gt;") > 10


def test_a_result_without_energy_physics_peers_and_load() -> None:
    full = a_result(model=a_model(kl_mean=None))
    own = [replace(m, energy=None) for m in full.measurements if m.engine == OURS]
    bare = replace(
        full, engines=full.engines[:1], measurements=own, ratios=[], energy=None, physics=None, sustained=None
    )
    text = to_html([bare])
    assert len(Page(text).all("svg")) == 2  # the distributions of gaps and of times to the first token
    assert "Energy was not measured." in text
    assert "KL to fp32 not measured" in text


def test_no_results() -> None:
    assert Page(to_html([])).all("article") == []


def test_ratios_are_drawn_for_each_peer_and_case() -> None:
    plot = ratio_plot(a_result())
    assert plot is not None
    found = texts(plot.svg)
    assert [found.count(case) for case in ("pp512", "tg128", "tg128@d512", "chat", "batch")] == [1] * 5
    assert len([text for text in found if text.endswith("×")]) == 9  # one peer has no batch
    assert ratio_plot(replace(a_result(), ratios=[])) is None


@pytest.mark.parametrize(("metric", "engines"), [("itl_s", 2), ("ttft_s", 3)])
def test_a_distribution_has_a_curve_for_each_engine_that_tells_it(metric: str, engines: int) -> None:
    plot = latency_plot(a_result(), metric)
    assert plot is not None
    curves = list(ElementTree.fromstring(plot.svg).iter("path"))
    assert len(curves) == engines
    for curve in curves:  # it rises from 0 to all samples, and time goes on
        points = [tuple(map(float, p.split())) for p in (curve.get("d") or "")[1:].split("L")]
        assert points == sorted(points, key=lambda p: (p[0], -p[1]))
        assert (points[0][1], points[-1][1]) == (250.0, min(p[1] for p in points))
    empty = [replace(m, samples={}) for m in a_result().measurements]
    assert latency_plot(replace(a_result(), measurements=empty), metric) is None


def test_tokens_that_arrive_at_once_have_no_gap() -> None:
    result = a_result()
    found = [replace(m, samples={"itl_s": [0.0, 0.0, 0.01, 0.5]}) for m in result.measurements]
    plot = latency_plot(replace(result, measurements=found), "itl_s")
    assert plot is not None
    assert {"0", "100"} <= set(texts(plot.svg))  # a linear axis in ms, as a logarithm has no zero


def test_energy_bars_name_their_source() -> None:
    plot = energy_plot(a_result(energy=measured()))
    assert plot is not None
    assert plot.note.startswith("Measured, scope package, source rapl.")
    root = ElementTree.fromstring(plot.svg)
    bars = [r for r in root.iter("rect") if "bar" in (r.get("class") or "")]
    inner = [r for r in root.iter("rect") if "inner" in (r.get("class") or "")]
    assert len(bars) == len(inner) == 14
    for bar, part in zip(bars, inner, strict=True):  # 0.7 of the total, up to the rounding of places
        share = float(part.get("width") or 0) / float(bar.get("width") or 1)
        assert share == pytest.approx(0.7, abs=0.02)


def test_a_load_over_time_leaves_gaps_where_a_sensor_said_nothing() -> None:
    plot = sustained_plot(a_load())
    assert plot is not None
    assert [text for text in texts(plot.svg) if text in {"tok/s", "W", "°C", "GHz"}] == ["tok/s", "W", "°C"]
    assert "No sensor for GHz." in plot.note
    assert len(list(ElementTree.fromstring(plot.svg).iter("path"))) == 4  # watts in two parts
    assert sustained_plot(replace(a_load(), points=a_load().points[:1])) is None


def test_the_frontier_invents_no_divergence() -> None:
    speed, energy = frontier_plots(several())
    for plot in (speed, energy):
        root = ElementTree.fromstring(plot.svg)
        tips = [element.text or "" for element in root.iter("title")]
        assert sum("pocketlm int8" in tip and "KL 0.0108" in tip for tip in tips) == 1
        assert sum("pocketlm fp32" in tip and "KL 0.0000" in tip for tip in tips) == 1
        assert all(
            "KL not measured" in tip for tip in tips if "int4" in tip or LLAMA in tip or ORT_GENAI in tip
        )
        hollow = [e for e in root.iter() if "hollow" in (e.get("class") or "")]
        assert len(hollow) == 7  # two peers in three results, and int4
        assert "KL not measured" in texts(plot.svg)
    assert "scope process" in energy.note


def test_the_frontier_does_not_compare_scopes() -> None:
    mixed = [a_result(), a_result(model=a_model(precision="fp32"), energy=measured())]
    assert [plot.title for plot in frontier_plots(mixed)] == ["smollm2-135m: quality against speed"]


def test_a_frontier_needs_two_points() -> None:
    result = a_result()
    alone = replace(
        result, engines=result.engines[:1], measurements=[m for m in result.measurements if m.engine == OURS]
    )
    assert frontier_plots([alone]) == []
    assert frontier_plots([replace(alone, cases=[], measurements=[])]) == []
    assert set(result_plots(alone)) == {"speed", "energy", "sustained"}


def test_labels_do_not_overlap() -> None:
    close = [a_result(model=a_model(precision=f"p{i}", kl_mean=0.01 + i / 2000)) for i in range(3)]
    for plot in frontier_plots(close):
        labels = [
            e for e in ElementTree.fromstring(plot.svg).iter("text") if (e.text or "").startswith("pocketlm")
        ]
        places = [(float(e.get("x") or 0), float(e.get("y") or 0)) for e in labels]
        assert len(places) == 3
        for i, (x, y) in enumerate(places):
            assert all(abs(y - v) >= 13 or abs(x - u) >= 60 for u, v in places[:i])


def test_scales_and_their_ticks() -> None:
    linear = Scale(0, 10, 50, 150)
    assert (linear(0), linear(5), linear(99)) == (50, 100, 150)
    assert linear.ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Scale(3, 3, 0, 10).ticks() == [3]
    log = Scale(0.01, 1, 0, 100, log=True)
    assert log(0.1) == pytest.approx(50)
    assert [tick_text(t) for t in log.ticks(3)] == ["0.01", "0.1", "1"]
    assert Scale(1, 4, 0, 1, log=True).ticks(6) == [1, 1.5, 2, 3]
    assert [tick_text(t) for t in (0.5, 10, 2.5, 12000)] == ["0.5", "10", "2.5", "12,000"]


def test_a_drawing_escapes_its_texts() -> None:
    drawing = Drawing(10, 10, 'a "<b>"')
    drawing.text((1, 2), "<i>&")
    root = ElementTree.fromstring(str(drawing))
    assert root.get("aria-label") == 'a "<b>"'
    assert texts(str(drawing)) == ["<i>&"]
