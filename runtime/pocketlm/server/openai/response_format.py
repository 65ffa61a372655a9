"""`response_format`: what an answer has to be, as a JSON schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pocketlm.server.fields import Fields


class Text(Fields):
    type: Literal["text"]


class JsonObject(Fields):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """llama-server's addition"""


class NamedSchema(Fields):
    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    """for readers: the model is not told"""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """no difference: the schema is always kept to"""


class JsonSchema(Fields):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[Text | JsonObject | JsonSchema, Field(discriminator="type")]


def schema_of(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """None for plain text."""
    match response_format:
        case JsonObject(schema_=schema):
            return {"type": "object"} if schema is None else schema
        case JsonSchema():
            return response_format.json_schema.schema_
    return None
