"""What can be checked of a page's accessibility without a person: names, ids, and contrast (WCAG 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

_NAMELESS = """() => {
  const visible = (each) => each.checkVisibility({ visibilityProperty: true });
  const name = (each) => each.getAttribute("aria-label") || each.innerText?.trim() ||
    [...(each.labels ?? [])].map((label) => label.textContent.trim()).join(" ");
  const named = "button, a, input, select, textarea, dialog[open], [role=group], nav, aside";
  return [...document.querySelectorAll(named)]
    .filter((each) => visible(each) && !name(each) && !each.getAttribute("aria-labelledby"))
    .map((each) => each.outerHTML);
}"""

_REPEATED_IDS = """() => {
  const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
  return ids.filter((id, index) => ids.indexOf(id) !== index);
}"""

_DANGLING = """() => ["for", "aria-labelledby", "aria-describedby", "aria-controls"].flatMap((attribute) =>
  [...document.querySelectorAll(`[${attribute}]`)]
    .flatMap((each) => each.getAttribute(attribute).split(" "))
    .filter((id) => !document.getElementById(id)))"""

# Contrast ratio of each visible piece of text with what is behind it (WCAG 2.2, 1.4.3); controls that are
# switched off are exempt there.
_FAINT = """() => {
  const numbers = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return color.startsWith("color(") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);
  const background = (element) => {
    if (!element) return [255, 255, 255];
    const color = numbers(getComputedStyle(element).backgroundColor);
    return color[3] === 1 ? color.slice(0, 3) : over(color, background(element.parentElement));
  };
  const luminance = (color) => color.map((each) => each / 255)
    .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
    .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest(":disabled, .heard, .skip, noscript, .left-out")) continue;
    if (!element.checkVisibility({ visibilityProperty: true })) continue;
    const style = getComputedStyle(element);
    const px = parseFloat(style.fontSize);
    const large = px >= 24 || (px >= 18.66 && style.fontWeight >= 700);
    const below = background(element);
    const found = ratio(over(numbers(style.color), below), below);
    if (found < (large ? 3 : 4.5)) faint.push(`${node.data.trim().slice(0, 40)}: ${found.toFixed(2)}`);
  }
  return faint;
}"""


def faults(page: Page) -> list[str]:
    """What is wrong with what can be seen now."""
    checks = {
        "no name": _NAMELESS,
        "id twice": _REPEATED_IDS,
        "names nothing": _DANGLING,
        "too faint": _FAINT,
    }
    return [f"{what}: {each}" for what, script in checks.items() for each in page.evaluate(script)]
