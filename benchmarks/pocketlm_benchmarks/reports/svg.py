"""Drawing with SVG elements: scales, axes, marks.

Colours come from classes, which the page defines for light and dark; ElementTree escapes all text. There are
no `style` attributes, as the page's security policy forbids them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from pocketlm_benchmarks.reports.formatting import number

FONT = 13.0
_GLYPH = 0.6  # mean width of a character over the font's size, in the usual sans-serif faces

Point = tuple[float, float]


def text_width(text: str, font: float = FONT) -> float:
    """About how wide a text is drawn."""
    return len(text) * font * _GLYPH


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto places from `start` to `end`, in proportion or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = map(self._position, (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends."""
        return _log_ticks(self.low, self.high, most) if self.log else _ticks(self.low, self.high, most)

    def _position(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value


def _ticks(low: float, high: float, most: int) -> list[float]:
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if span / (power * m) <= most)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in factors if low <= m * 10.0**d <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            return ticks
    return ticks


class Drawing:
    """A picture that scales to the width it gets; `str` renders it at the width and height it has by then."""

    def __init__(self, width: float, height: float, description: str) -> None:
        self.width, self.height = width, height
        self._root = ElementTree.Element(
            "svg",
            {
                "role": "img",
                "aria-label": description,
                "class": "plot",
            },
        )

    def line(self, a: Point, b: Point, style: str) -> None:
        ends = {"x1": a[0], "y1": a[1], "x2": b[0], "y2": b[1]}
        self._add("line", style, ends)

    def path(self, points: Sequence[Point], style: str) -> None:
        """A line through the points."""
        data = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self._add("path", style, {}).set("d", data)

    def rect(self, x: float, y: float, width: float, height: float, style: str, tip: str = "") -> None:
        size = {"x": x, "y": y, "width": max(0.0, width), "height": height}
        self._tip(self._add("rect", style, size), tip)

    def mark(self, kind: int, centre: Point, style: str, tip: str = "", radius: float = 5.0) -> None:
        """Circle, square, triangle or diamond: series differ by shape too, not by colour alone."""
        x, y = centre
        r = radius
        if kind % 4 == 0:
            element = self._add("circle", style, {"cx": x, "cy": y, "r": r})
        else:
            corners = {
                1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
                2: ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
                3: ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
            }[kind % 4]
            element = self._add("polygon", style, {})
            element.set("points", " ".join(f"{_n(x + dx * r)},{_n(y + dy * r)}" for dx, dy in corners))
        self._tip(element, tip)

    def text(
        self, place: Point, text: str, style: str = "label", anchor: str = "start", font: float = FONT
    ) -> None:
        element = self._add("text", style, {"x": place[0], "y": place[1], "font-size": font})
        if anchor != "start":
            element.set("text-anchor", anchor)
        element.text = text

    def x_axis(self, scale: Scale, top: float, bottom: float, title: str, most: int = 6) -> None:
        """Grid lines from `top` to `bottom`, their values below."""
        for tick in scale.ticks(most):
            self.line((scale(tick), top), (scale(tick), bottom), "grid")
            self.text((scale(tick), bottom + 17), tick_text(tick), "tick", "middle", 12)
        if title:
            self.text(((scale.start + scale.end) / 2, bottom + 36), title, "label", "middle")

    def y_axis(self, scale: Scale, left: float, right: float, most: int = 5) -> None:
        """Grid lines from `left` to `right`, their values at the left."""
        for tick in scale.ticks(most):
            self.line((left, scale(tick)), (right, scale(tick)), "grid")
            self.text((left - 7, scale(tick) + 4), tick_text(tick), "tick", "end", 12)

    def __str__(self) -> str:
        self._root.set("viewBox", f"0 0 {_n(self.width)} {_n(self.height)}")
        return ElementTree.tostring(self._root, encoding="unicode")

    def _add(self, tag: str, style: str, numbers: dict[str, float]) -> ElementTree.Element:
        attributes = {name: _n(value) for name, value in numbers.items()}
        return ElementTree.SubElement(self._root, tag, {"class": style, **attributes})

    @staticmethod
    def _tip(element: ElementTree.Element, tip: str) -> None:
        if tip:
            ElementTree.SubElement(element, "title").text = tip


def tick_text(value: float) -> str:
    """A round value without zeros at its end."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
