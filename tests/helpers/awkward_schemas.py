"""JSON schemas that trip up converters: each by a name that says what is awkward."""

from __future__ import annotations

from typing import Any

STRING: dict[str, Any] = {"type": "string"}
INTEGER: dict[str, Any] = {"type": "integer"}


def record(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names}


SCHEMAS: dict[str, Any] = {
    "anything": {},
    "true": True,
    "any object": {"type": "object"},
    "empty object": {"type": "object", "properties": {}, "additionalProperties": False},
    "nested objects": record(a=record(b=record(c=record(d={"type": "boolean"})))),
    "array with bounds": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 4},
    "empty array": {"type": "array", "maxItems": 0},
    "array of arrays": {"type": "array", "maxItems": 3, "items": {"type": "array", "items": INTEGER}},
    "tuple": {
        "type": "array",
        "prefixItems": [STRING, INTEGER, {"type": "null"}],
        "items": False,
        "minItems": 3,
    },
    "open tuple": {"type": "array", "prefixItems": [INTEGER], "items": {"type": "boolean"}, "maxItems": 3},
    "enum with quotes and unicode": {"enum": ['say "hi"', "naïve 🙂", "back\\slash", "tab\t", "日本"]},
    "enum of all types": {"enum": [1, 2.5, None, True, "x", [1, "a"], {"k": []}]},
    "const null": {"const": None},
    "const object": {"const": {"z": 1, "a": ['"', "\n", {}]}},
    "boolean or null": {"type": ["boolean", "null"]},
    "optional properties": record([], a=INTEGER, b=STRING, c={"type": "null"}),
    "order of required": record(["z", "a"], a=INTEGER, z=INTEGER, m=INTEGER),
    "required but unnamed": {"type": "object", "properties": {"a": INTEGER}, "required": ["b"]},
    "additional integers": {"type": "object", "additionalProperties": INTEGER, "minProperties": 1},
    "additional beside named": {
        "type": "object",
        "properties": {"a": INTEGER},
        "additionalProperties": {"type": "boolean"},
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,4}$": INTEGER, "^s_": STRING},
        "additionalProperties": False,
    },
    "at most two properties": {"type": "object", "additionalProperties": INTEGER, "maxProperties": 2},
    "unicode keys": record(**{"naïve": INTEGER, "ключ": STRING, "🙂": {"type": "null"}, 'a"b\\c\n': INTEGER}),
    "keys that begin alike": record(["ab"], a=INTEGER, ab=INTEGER, abc=INTEGER),
    "integer range": {"type": "integer", "minimum": -12, "maximum": 345},
    "exclusive range": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "number range": {"type": "number", "minimum": -0.5, "maximum": 1.25},
    "number with exponents": {"type": "number"},
    "multiple of": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 100},
    "half steps": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 4},
    "length of text": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "pattern with escapes": {"type": "string", "pattern": '^"\\\\["\n/]\\t$'},
    "pattern anywhere": {"type": "string", "pattern": "[0-9]z", "maxLength": 8},
    "pattern and length": {"type": "string", "pattern": "^(ab|c)*$", "minLength": 2, "maxLength": 6},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "time": {"type": "string", "format": "time"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email"},
    "ipv4 or ipv6": {"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]},
    "anyOf objects": {"anyOf": [record(kind={"const": "a"}, n=INTEGER), record(kind={"const": "b"})]},
    "oneOf types": {"oneOf": [INTEGER, STRING, {"type": "array", "items": INTEGER}]},
    "oneOf with a tag": {
        "oneOf": [record(tag={"const": "x"}, v=INTEGER), record(tag={"const": "y"}, v=STRING)],
        "discriminator": {"propertyName": "tag"},
    },
    "allOf": {"allOf": [record(a=INTEGER), record(b=STRING)]},
    "allOf narrows": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    "siblings of anyOf": {
        "type": "object",
        "required": ["a"],
        "anyOf": [record(b=INTEGER), record(c=STRING)],
    },
    "recursive tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": record(
                ["value"], value=INTEGER, children={"type": "array", "items": {"$ref": "#/$defs/node"}}
            )
        },
    },
    "recursive list": record(head=INTEGER, tail={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "mutual recursion": {
        "$defs": {
            "a": record([], b={"$ref": "#/$defs/b"}),
            "b": record([], a={"$ref": "#/$defs/a"}),
        },
        "$ref": "#/$defs/a",
    },
    "escaped pointer": {"$defs": {"a/b~c": INTEGER}, "type": "array", "items": {"$ref": "#/$defs/a~1b~0c"}},
    "annotations": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "description": "D",
        "x-order": 3,
        **record(["a"], a={"type": "integer", "default": 3, "examples": [1], "deprecated": True}),
    },
    "wide enum": {"enum": [f"option {n}" for n in range(300)]},
    "many properties": record(["p7"], **{f"p{n}": {"type": "boolean"} for n in range(60)}),
}

# Each with a part of what the error must say.
REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "json_schema is no JSON"),
    "no schema": ({"properties": {"a": 3}}, "#/properties/a: 3 is no schema"),
    "not a number": ({"const": float("nan")}, "json_schema is no JSON"),
    "too deep": ('{"items":' * 100_000 + "{}" + "}" * 100_000, "json_schema is no JSON"),
    "a set": ({"enum": {1, 2}}, "json_schema is no JSON"),
    "typing error": ({"items": {"maxlength": 3}}, "#/items: maxlength is no keyword. Did you mean maxLength"),
    "properties as a list": ({"properties": ["a"]}, 'properties is ["a"], expected an object'),
    "unknown type": ({"anyOf": [{"type": "string"}, {"type": "strin"}]}, "#/anyOf/1: Invalid type: strin"),
    "broken pattern": (record(**{"a/b": {"type": "string", "pattern": "("}}), "#/properties/a~1b: regex"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "unique items": ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
    "not": ({"items": {"not": {"type": "string"}}}, "#/items: not is not supported"),
    "conditions": ({"if": {}, "then": {}}, "if is not supported"),
    "contains": ({"contains": {"type": "integer"}}, "contains is not supported"),
    "property names": ({"propertyNames": {"pattern": "a"}}, "propertyNames is not supported. Use pattern"),
    "OpenAPI's null": ({"type": "string", "nullable": True}, 'use "type": ["…", "null"]'),
    "llguidance's own options": ({"x-guidance": {"lenient": True}}, "x-guidance is not supported"),
    "unknown format": ({"type": "string", "format": "isbn"}, "Unknown format: isbn"),
    "oneOf that overlaps": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "missing reference": ({"$ref": "#/$defs/none"}, "/$defs/none"),
    "remote reference": ({"$ref": "https://example.com/s.json"}, "example.com"),
    "repeated keys": ({"additionalProperties": INTEGER, "minProperties": 2}, "minProperties is 2, more than"),
    "false": (False, "Unsatisfiable"),
    "empty range": (
        record(a={"type": "integer", "minimum": 3, "maximum": 2}),
        "required property 'a' is unsatisfiable",
    ),
    "endless object": (record(a={"$ref": "#"}), "contains itself without an end"),
    "endless array": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "without an end"),
    "endless tuple": ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "without an end"),
    "endless both ways": (
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}
        | {"$ref": "#/$defs/a"},
        "without an end",
    ),
    "fine steps": ({"type": "number", "multipleOf": 0.0000001}, "multipleOf is 1e-07"),
    "large steps": ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf is 1000003, at most 5 digits"),
    "too many schemas": ({"anyOf": [{"const": n} for n in range(3000)]}, "more than 1,000 schemas"),
    "long pattern": ({"type": "string", "pattern": "a?" * 20_000}, "pattern"),
    "product of choices": (
        {"allOf": [{"anyOf": [record([], **{f"k{i}": {"const": j}}) for j in range(4)]} for i in range(12)]},
        "schema too large",
    ),
}
