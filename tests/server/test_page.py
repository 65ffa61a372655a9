"""The files of the chat page over HTTP: a fixed list, with headers that let nothing else in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from pocketlm.server import page

FOLDER = Path(str(resources.files("pocketlm.server") / "page"))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(page.routes())
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("path", sorted(page.PATHS))
def test_each_file_comes_with_its_type_and_strict_headers(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    suffix = "html" if path == "/" else path.rsplit(".", 1)[1]
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["Content-Type"].split(";")[0] == types[suffix]
    for name, value in page.HEADERS.items():
        assert answer.headers[name] == value
    name = "index.html" if path == "/" else path.removeprefix("/page/")
    assert answer.content == (FOLDER / name).read_bytes()


def test_the_policy_allows_this_server_only() -> None:
    directives = dict(each.split(" ", 1) for each in page.CONTENT_SECURITY_POLICY.split("; "))
    assert directives.pop("require-trusted-types-for") == "'script'"
    assert directives.pop("img-src") == "'self' data:"
    assert directives["default-src"] == "'none'"
    assert set(directives.values()) == {"'self'", "'none'"}


def test_a_known_file_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/")
    again = client.get("/", headers={"If-None-Match": f'"other", W/{first.headers["ETag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    assert again.headers["Content-Security-Policy"] == page.CONTENT_SECURITY_POLICY
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_tells_the_same_without_the_content(client: TestClient) -> None:
    get, head = client.get("/page/main.js"), client.head("/page/main.js")
    assert head.content == b""
    assert head.headers["Content-Length"] == str(len(get.content))
    assert head.headers["ETag"] == get.headers["ETag"]


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/nothing.js",
        "/page/index.html",
        "/page/..%2fpage.py",
        "/page/%2e%2e/page.py",
        "/page/vendor/README.md",
        "/page//etc/passwd",
        "/page/main.js%00",
    ],
)
def test_nothing_else_is_there(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_nothing_can_be_written(client: TestClient) -> None:
    assert client.post("/", content=b"x").status_code == 405


def test_the_list_is_all_that_the_folder_holds() -> None:
    """A new module that is not listed would be missing on the page."""
    there = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert there - {"vendor/README.md", "vendor/LICENSE.marked.md"} == set(page.NAMES)


def test_what_the_files_name_is_listed() -> None:
    for name in page.NAMES:
        if name.startswith("vendor/") or not name.endswith((".js", ".html")):
            continue
        text = (FOLDER / name).read_text(encoding="utf-8")
        imports = re.findall(r'(?:from|import) "\./([^"]+)"', text)
        parts = re.findall(r'(?:src|href)="page/([^"]+)"', text)
        assert {*imports, *parts} <= set(page.NAMES)


def test_no_file_names_another_server() -> None:
    for name in page.NAMES:
        if not name.startswith("vendor/"):
            text = (FOLDER / name).read_text(encoding="utf-8")
            assert set(re.findall(r"\w+://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}, name


def test_no_file_turns_text_into_code() -> None:
    """What the policy would stop in the browser is not even there."""
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function|srcdoc"
    for name in page.NAMES:
        if not name.startswith("vendor/"):
            assert not re.search(sinks, (FOLDER / name).read_text(encoding="utf-8")), name


def test_the_vendored_library_is_what_its_note_says() -> None:
    note = (FOLDER / "vendor" / "README.md").read_text(encoding="utf-8")
    content = (FOLDER / "vendor" / "marked.esm.js").read_bytes()
    assert f"`{hashlib.sha256(content).hexdigest()}`" in note
    version = re.search(rb"marked v([\d.]+)", content)
    assert version is not None and f"{version[1].decode()}, unchanged" in note
    assert "MIT" in note and (FOLDER / "vendor" / "LICENSE.marked.md").is_file()
