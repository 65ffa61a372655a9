"""Which JSON schemas can be kept to, and the form in which llguidance keeps to them exactly.

llguidance refuses keywords that it knows and cannot enforce, but says nothing of names that it does not know,
and allows a little more than a schema in a few places. Here

1. unknown and unsupported keywords are refused, by name and place;
2. `date` and `date-time` know leap years, and no leap seconds;
3. `minProperties` is refused where repeated keys could make up for missing ones;
4. a schema that only an endless text could follow is refused;
5. an object that names its properties gets no others unless `additionalProperties` allows them: small models
   would go on inventing some. What is left out this way a schema never asks for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from pocketlm.errors import InvalidSettingError, did_you_mean

Schema = dict[str, Any] | bool

MAX_SUBSCHEMAS = 1000  # llguidance follows them by recursion
MAX_PATTERN_CHARACTERS = 1 << 14  # of all patterns together: a regex's cost can grow with its square
MAX_LOCATED = 200  # schemas that are tried one by one for where a problem lies
MAX_MULTIPLE_DIGITS = 5  # an automaton has a state for each remainder

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES = ("items", "additionalProperties", "additionalItems")
# fmt: off
_ASSERTIONS = frozenset((
    "$ref", "allOf", "anyOf", "oneOf", "enum", "const", "type", "items", "additionalItems",
    "prefixItems", "minItems", "maxItems", "properties", "additionalProperties", "patternProperties",
    "required", "minProperties", "maxProperties", "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
))
_ANNOTATIONS = frozenset((
    "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "default",
    "definitions", "deprecated", "description", "discriminator", "example", "examples", "id",
    "readOnly", "title", "writeOnly",
))
# fmt: on
_UNSUPPORTED = {
    "not": "",
    "if": "",
    "then": "",
    "else": "",
    "contains": "",
    "minContains": "",
    "maxContains": "",
    "uniqueItems": "",
    "propertyNames": " Use patternProperties with additionalProperties: false.",
    "dependencies": "",
    "dependentRequired": "",
    "dependentSchemas": "",
    "unevaluatedItems": " Use items: false.",
    "unevaluatedProperties": " Use additionalProperties: false.",
    "$dynamicRef": " Use $ref.",
    "$dynamicAnchor": "",
    "$recursiveRef": " Use $ref.",
    "contentSchema": "",
    "nullable": ' It is OpenAPI\'s: use "type": ["…", "null"].',
    "x-guidance": " It changes what the other keywords mean.",
}
_HARMLESS = {"uniqueItems": False, "nullable": False}  # with this value they ask for nothing

# RFC 3339 as far as a calendar goes. Year 0000 exists there, but in few programs.
_DATE = (
    r"(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|"
    r"02-(?:0[1-9]|1[0-9]|2[0-8]))|"
    r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def checked(schema: Mapping[str, Any] | bool | str) -> Schema:
    """A copy of `schema` that llguidance keeps to exactly.

    Raises InvalidSettingError for what is no schema or cannot be kept.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        copy = json.loads(text)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidSettingError(f"json_schema is no JSON: {error or 'it is nested too deeply'}.") from None
    places = _Places(copy)
    for place, node in places.nodes.items():
        _check_keywords(place, node)
    length = sum(sum(map(len, _patterns(node))) for node in places.nodes.values())
    if length > MAX_PATTERN_CHARACTERS:
        raise InvalidSettingError(
            f"json_schema has patterns of {length:,} characters, "
            f"at most {MAX_PATTERN_CHARACTERS:,} are possible."
        )
    places.check_finite()
    closed = not any(map(_combines, places.nodes.values()))
    for node in places.nodes.values():
        _sharpen(node, closed)
    result: Schema = copy
    return result


def subschemas(schema: Any, place: str = "#") -> Iterator[tuple[str, Any]]:
    """`schema` and every schema in it, each with its JSON pointer; those outside come first."""
    waiting = [(place, schema)]
    while waiting:
        place, node = waiting.pop()
        yield place, node
        if isinstance(node, dict):
            waiting.extend(reversed(list(_children(place, node))))


def _children(place: str, node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            for name, child in value.items():
                yield f"{place}/{key}/{name.replace('~', '~0').replace('/', '~1')}", child
        elif key in _LISTS and isinstance(value, list):
            for index, child in enumerate(value):
                yield f"{place}/{key}/{index}", child
        elif key in _SINGLES:
            yield f"{place}/{key}", value


def _check_keywords(place: str, node: Any) -> None:
    if isinstance(node, bool):
        return
    if not isinstance(node, dict):
        raise _refused(place, f"{json.dumps(node)[:60]} is no schema, expected an object, true or false.")
    for key, value in node.items():
        if key in _UNSUPPORTED and _HARMLESS.get(key, True) is not value:
            raise _refused(place, f"{key} is not supported.{_UNSUPPORTED[key]}")
        if key not in _ASSERTIONS | _ANNOTATIONS | _UNSUPPORTED.keys() and not key.startswith("x-"):
            raise _refused(place, f"{key} is no keyword.{did_you_mean(key, _ASSERTIONS | _ANNOTATIONS)}")
        if key in _MAPS and not isinstance(value, dict):
            raise _refused(place, f"{key} is {json.dumps(value)[:60]}, expected an object.")
    multiple = node.get("multipleOf")
    if isinstance(multiple, int | float) and _digits(multiple) > MAX_MULTIPLE_DIGITS:
        raise _refused(place, f"multipleOf is {multiple}, at most {MAX_MULTIPLE_DIGITS} digits are possible.")
    least = node.get("minProperties")
    if isinstance(least, int | float) and least > max(1, len(set(_strings(node.get("required"))))):
        raise _refused(
            place,
            f"minProperties is {least}, more than the required properties: a model could repeat a key. "
            "Name the properties under required.",
        )


def _digits(number: float) -> int:
    """Digits of `number` written out: an automaton counts the places behind the point too."""
    whole, _, fraction = format(Decimal(repr(number)), "f").partition(".")
    return len(whole.lstrip("0")) + len(fraction.rstrip("0"))


class _Places:
    """The schemas within one schema, by JSON pointer."""

    def __init__(self, schema: Any) -> None:
        self.nodes: dict[str, Any] = {}
        for place, node in subschemas(schema):
            if len(self.nodes) == MAX_SUBSCHEMAS:
                raise InvalidSettingError(
                    f"json_schema has more than {MAX_SUBSCHEMAS:,} schemas within it. Use a smaller one."
                )
            self.nodes[place] = node

    def check_finite(self) -> None:
        """Raises InvalidSettingError if no finite text follows the schema.

        By elimination: what ends by itself does, then what needs only that, until nothing is added.
        """
        endless = set(self.nodes)
        while True:
            ending = {
                place
                for place in reversed(self.nodes)
                if place in endless and not any(need <= endless for need in self._needs(place))
            }
            if not ending:
                break
            endless -= ending
        if "#" in endless:
            raise _refused("#", "it contains itself without an end. Make a part optional, or allow null.")

    def _needs(self, place: str) -> Iterator[set[str]]:
        """Sets of places of which one each must end, for the schema at `place` to end."""
        node = self.nodes[place]
        if not isinstance(node, dict):
            return
        reference = node.get("$ref")
        if reference in self.nodes:
            yield {reference}
        for index, _ in enumerate(node.get("allOf") or ()):
            yield {f"{place}/allOf/{index}"}
        for key in ("anyOf", "oneOf"):
            if options := node.get(key):
                yield {f"{place}/{key}/{index}" for index in range(len(options))}
        if node.get("type") in ("object", ["object"]):
            for name in _strings(node.get("required")):
                child = f"{place}/properties/{name.replace('~', '~0').replace('/', '~1')}"
                if child in self.nodes:
                    yield {child}
        if node.get("type") in ("array", ["array"]):
            yield from self._needed_items(place, node)

    def _needed_items(self, place: str, node: dict[str, Any]) -> Iterator[set[str]]:
        least = node.get("minItems")
        least = least if isinstance(least, int) else 0
        first = len(node["prefixItems"]) if isinstance(node.get("prefixItems"), list) else 0
        for index in range(min(least, first)):
            yield {f"{place}/prefixItems/{index}"}
        if least > first and f"{place}/items" in self.nodes:
            yield {f"{place}/items"}


def _patterns(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from _strings([node.get("pattern"), *(node.get("patternProperties") or ())])


def _combines(node: Any) -> bool:
    """Whether the schema merges several into one, each of which may name properties of its own."""
    if not isinstance(node, dict):
        return False
    parts = sum(key in node for key in ("$ref", "anyOf", "oneOf"))
    return "allOf" in node or parts > 1 or (parts == 1 and bool(node.keys() & {"properties", "required"}))


def _sharpen(node: Any, closed: bool) -> None:
    if not isinstance(node, dict):
        return
    for key, value in _HARMLESS.items():
        if node.get(key) is value:
            del node[key]
    pattern = _FORMATS.get(node["format"]) if isinstance(node.get("format"), str) else None
    if pattern is not None and "pattern" not in node:
        del node["format"]
        node["pattern"] = pattern
    if closed and node.get("properties") and "patternProperties" not in node:
        named = node["properties"].keys()
        if named >= set(_strings(node.get("required"))) and not node.get("minProperties"):
            node.setdefault("additionalProperties", False)


def locate(schema: Schema, problem: str, problem_of: Callable[[Schema], str | None]) -> str:
    """The pointer of the innermost schema that by itself has `problem`, or the whole one's."""
    found = "#"
    inner = itertools.islice(subschemas(schema), 1, MAX_LOCATED)
    for place, node in inner:
        if place.startswith(f"{found}/") and "$ref" not in json.dumps(node) and problem_of(node) == problem:
            found = place
    return found


def _strings(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _refused(place: str, problem: str) -> InvalidSettingError:
    return InvalidSettingError(f"json_schema at {place}: {problem}")
