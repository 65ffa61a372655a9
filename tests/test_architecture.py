"""The packages' order, what an import costs, and the public names."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pocketlm

ROOT = Path(__file__).parents[1]

# Each imports only from itself and from those above it.
PACKAGES = {
    "pocketlm_models": ROOT / "models" / "pocketlm_models",
    "pocketlm": ROOT / "runtime" / "pocketlm",
    "pocketlm_exporters": ROOT / "exporters" / "pocketlm_exporters",
    "pocketlm_benchmarks": ROOT / "benchmarks" / "pocketlm_benchmarks",
}
ORDER = list(PACKAGES)

SERVES = {"fastapi", "starlette", "uvicorn", "prometheus_client", "psutil", "pydantic"}
"""The server's packages: nothing outside of pocketlm.server imports them."""

HEAVY = SERVES | {"onnx", "onnx_ir", "torch", "transformers", "gguf", "safetensors", "ml_dtypes", "optimum"}


def imports_of(source: str, module: str) -> Iterator[str]:
    """Absolute names of what `source` imports, wherever in the file; `module` is what a dot stands for.

    Of `from x import y` both x and x.y are given, as y may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            arguments = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            yield from (argument for argument in arguments if isinstance(argument, str))


def sources(package: str) -> Iterator[tuple[Path, str]]:
    """Each source file and the package that its relative imports start from."""
    folder = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        yield path, ".".join([package, *path.parent.relative_to(folder).parts])


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    forbidden = set(ORDER[ORDER.index(package) + 1 :])
    if package == "pocketlm":
        forbidden |= HEAVY
    found = list(sources(package))
    assert found
    for path, module in found:
        may = SERVES if "pocketlm.server" in module else set()
        tops = {name.split(".")[0] for name in imports_of(path.read_text(encoding="utf-8"), module)}
        assert not tops & (forbidden - may), f"{path} imports {tops & forbidden}"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b as c", {"a.b"}),
        ("from a.b import c", {"a.b", "a.b.c"}),
        ("def f():\n    from a import b", {"a", "a.b"}),
        ("from . import b", {"x.y", "x.y.b"}),
        ("from .a import b", {"x.y.a", "x.y.a.b"}),
        ("from ..a import b", {"x.a", "x.a.b"}),
        ("importlib.import_module('a.b')", {"a.b"}),
    ],
)
def test_the_guard_sees(source: str, names: set[str]) -> None:
    assert set(imports_of(source, "x.y")) == names


def test_all_code_lies_in_the_four_packages() -> None:
    for folder in PACKAGES.values():
        assert [path.name for path in folder.parent.iterdir() if path.suffix == ".py"] == []
        assert (folder / "py.typed").is_file()


def modules_after(statement: str) -> set[str]:
    """Top-level names of the modules that a new interpreter has loaded after `statement`."""
    script = (
        f"import sys, json\n{statement}\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    )
    paths = [str(folder.parent) for folder in PACKAGES.values()]
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["pocketlm", "pocketlm.engine", "pocketlm.cli"])
def test_an_import_loads_nothing_heavy(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert "pocketlm" in loaded
    assert not loaded & (HEAVY | {"pocketlm_exporters", "pocketlm_benchmarks"})
    assert ("onnxruntime" in loaded) is (module == "pocketlm.engine")


def test_help_is_quick() -> None:
    loaded = modules_after(
        "sys.argv = ['pocketlm', '--help']\n"
        "from pocketlm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert {"pocketlm", "typer"} <= loaded
    assert not loaded & (HEAVY | {"onnxruntime", "numpy", "tokenizers", "huggingface_hub"})


def test_public_names() -> None:
    assert sorted(pocketlm.__all__) == [
        "Chat",
        "Completion",
        "Grammar",
        "Message",
        "Model",
        "Piece",
        "PocketlmError",
        "QueueFullError",
        "Sampling",
        "Settings",
        "Stream",
        "Timings",
        "ToolCall",
        "Usage",
        "load",
    ]
    assert dir(pocketlm) == sorted(pocketlm.__all__)
    for name in pocketlm.__all__:
        value = getattr(pocketlm, name)
        assert value.__name__ == name
        assert value.__module__.startswith("pocketlm.")


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'pocketlm' has no attribute 'loads'"):
        pocketlm.loads  # noqa: B018
