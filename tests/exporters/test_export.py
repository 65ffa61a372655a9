"""From a checkpoint folder to a verified bundle, and what happens when that fails."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from typer.testing import CliRunner

from helpers.tiny import TEMPLATE, VOCABULARY, tiny_bundle, tiny_checkpoint, tokenizer_json, write_folder
from pocketlm.bundle import open_bundle
from pocketlm.cli import build_app
from pocketlm.errors import CheckpointError, InvalidSettingError, QualityGateError, UnsupportedModelError
from pocketlm.manifest import Dimensions, Manifest, Tokens, read_manifest
from pocketlm.sources import SourceFiles
from pocketlm_exporters import texts
from pocketlm_exporters.export import export

LINEARS = ["qkv", "output", "gate_up", "down"]
PATHS = ["embedding", *(f"layers.{n}.{kind}" for n in (0, 1) for kind in LINEARS), "head"]
FILES = {"model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja"}


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to calibrate and verify on, where the figures do not matter."""
    whole = texts.windows
    monkeypatch.setattr(texts, "windows", lambda *arguments: whole(*arguments)[:1])


def precisions(manifest: Manifest) -> dict[str, str]:
    return {layer.path: layer.precision for layer in manifest.precision.layers}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_manifest_states_facts(precision: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{precision}_bundle")
    manifest = open_bundle(folder, verify=True).manifest
    assert (manifest.name, manifest.task, manifest.family) == ("tiny", "text-generation", "llama")
    assert manifest.dimensions == Dimensions(2, 64, 96, 4, 2, 16, VOCABULARY, 512)
    assert manifest.tokens == Tokens(None, (VOCABULARY - 3, VOCABULARY - 1), False)
    assert (manifest.source.kind, manifest.source.location, manifest.source.revision) == (
        "safetensors",
        "tests/tiny",
        "r1",
    )
    assert manifest.licence == "apache-2.0"
    assert manifest.exporter == f"pocketlm {importlib.metadata.version('pocketlm')}"
    assert manifest.files.keys() == FILES
    assert {path.name for path in folder.iterdir()} == FILES | {"manifest.json"}
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == tokenizer_json()
    quality = manifest.quality
    assert quality is not None
    assert quality.text == "verification.txt"
    assert quality.tokens > 5000
    assert quality.perplexity_fp32 > 1


def test_fp32_is_compared_with_itself(fp32_bundle: Path) -> None:
    manifest = read_manifest(fp32_bundle)
    assert manifest.precision.name == "fp32"
    assert precisions(manifest) == dict.fromkeys(PATHS, "fp32")
    assert all(layer.worst_error == 0 for layer in manifest.precision.layers)
    assert manifest.calibration is None
    quality = manifest.quality
    assert quality is not None
    assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0.0, 0.0, 1.0)
    assert quality.perplexity == quality.perplexity_fp32


def test_int8_is_smaller_and_nearly_as_good(int8_bundle: Path, fp32_bundle: Path) -> None:
    manifest, reference = read_manifest(int8_bundle), read_manifest(fp32_bundle)
    assert manifest.precision.name == "int8"
    assert precisions(manifest) == {
        path: {"embedding": "int8-block32", "output": "int8-row", "down": "int8-row"}.get(
            path.rpartition(".")[2], "int8-static"
        )
        for path in PATHS
    }
    assert all(0 < layer.worst_error < 0.01 for layer in manifest.precision.layers)
    sizes = [each.files["model.onnx.data"].bytes for each in (manifest, reference)]
    assert sizes[0] < 0.6 * sizes[1]  # the rotary tables are float32 in both
    assert manifest.calibration is not None
    assert manifest.calibration.text == "calibration.txt"
    assert manifest.calibration.tokens > 3000
    assert manifest.quality is not None
    assert reference.quality is not None
    assert 0 < manifest.quality.kl_mean < 0.02
    assert manifest.quality.kl_mean < manifest.quality.kl_p99
    assert 0.9 < manifest.quality.top1_agreement < 1
    assert manifest.quality.perplexity_fp32 == pytest.approx(reference.quality.perplexity, rel=1e-6)
    assert manifest.quality.perplexity == pytest.approx(reference.quality.perplexity, rel=0.05)


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize(
    "variant",
    [
        {"tie_word_embeddings": True, "biases": True},
        {"num_key_value_heads": 4, "head_dim": 48, "hidden_size": 40, "intermediate_size": 33},
        {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 1},
        {"max_position_embeddings": 48},  # less than the texts' windows
    ],
    ids=["tied, biases", "odd sizes", "sliding window", "short context"],
)
def test_other_models_keep_their_quality(variant: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path, checkpoint=tiny_checkpoint(**variant))
    manifest = open_bundle(folder).manifest
    assert manifest.quality is not None
    assert manifest.quality.kl_mean < 0.02
    assert "head" in precisions(manifest)


@pytest.mark.usefixtures("short_texts")
def test_a_model_without_a_template(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    source = write_folder(tmp_path / "source", checkpoint)
    (source.path / "chat_template.jinja").unlink()
    manifest = export(source, tmp_path / "bundle", precision="fp32")
    assert manifest.files.keys() == FILES - {"chat_template.jinja"}
    assert open_bundle(tmp_path / "bundle").chat_template is None


@pytest.mark.usefixtures("short_texts")
class TestGate:
    def test_a_strict_gate_is_met_with_finer_blocks(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        lenient = export(tiny_source, tmp_path / "lenient", max_kl=math.inf)
        assert lenient.quality is not None
        assert "blocks" not in lenient.precision.recipe
        gate = 0.8 * lenient.quality.kl_mean
        strict = export(tiny_source, tmp_path / "strict", max_kl=gate)
        assert strict.quality is not None
        assert strict.quality.kl_mean <= gate
        finer = [
            path
            for path, precision in precisions(strict).items()
            if precision == "int8-block32" and path != "embedding"
        ]
        # The down linears first: there they gain the most.
        assert {"layers.0.down", "layers.1.down"} <= set(finer)
        assert len(finer) in {4, 8, 9}
        assert f"{len(finer)} most sensitive linears in blocks of 32" in strict.precision.recipe
        assert strict == read_manifest(tmp_path / "strict")

    def test_an_impossible_gate_leaves_nothing(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        with pytest.raises(QualityGateError, match=r"at best, the quality gate is 0\. .*--max-kl 0\.\d+"):
            export(tiny_source, tmp_path / "bundle", max_kl=0.0)
        assert list(tmp_path.iterdir()) == []

    def test_an_earlier_bundle_stays(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        before = export(tiny_source, tmp_path / "bundle", precision="fp32")
        with pytest.raises(QualityGateError):
            export(tiny_source, tmp_path / "bundle", max_kl=0.0)
        assert open_bundle(tmp_path / "bundle").manifest == before
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    def test_fp32_has_no_gate_to_miss(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        assert export(tiny_source, tmp_path / "bundle", precision="fp32", max_kl=0.0).quality is not None


TASKS = [
    "Checking model.safetensors",
    "Calibrating",
    "Quantizing",
    "Writing the fp32 graph",
    "Writing the int8 graph",
    "Verifying",
]


@pytest.mark.usefixtures("short_texts")
class TestProgress:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interrupted_export_leaves_nothing(
        self, task: str, error: type[BaseException], tiny_source: SourceFiles, tmp_path: Path
    ) -> None:
        def interrupt(now: str, done: int, total: int, unit: str) -> None:
            if now == task:
                raise error("stop")

        with pytest.raises(error, match="stop"):
            export(tiny_source, tmp_path / "bundle", progress=interrupt)
        assert list(tmp_path.iterdir()) == []

    def test_each_task_comes_to_its_end(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        last: dict[str, tuple[int, int]] = {}

        def note(task: str, done: int, total: int, unit: str) -> None:
            before = last.get(task, (0, total))
            # A task that has ended may begin again, as the writing of a second graph does.
            assert before[0] <= done <= total == before[1] or before[0] == before[1]
            last[task] = done, total

        export(tiny_source, tmp_path / "bundle", progress=note)
        assert set(TASKS) <= set(last)
        assert all(done == total for done, total in last.values())


@pytest.mark.parametrize("precision", ["int3", "", "INT8"])
def test_an_unknown_precision(precision: str, tiny_source: SourceFiles, tmp_path: Path) -> None:
    message = f"precision is '{precision}'; expected fp32 or int8 or int4"
    with pytest.raises(InvalidSettingError, match=message):
        export(tiny_source, tmp_path / "bundle", precision=precision)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_kl", [-0.1, math.nan, -math.inf])
def test_a_bad_gate(max_kl: float, tiny_source: SourceFiles, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match=f"max_kl is {max_kl}; a number of nats from 0 on"):
        export(tiny_source, tmp_path / "bundle", max_kl=max_kl)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_source_leaves_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", tiny_checkpoint(model_type="gpt_neox"))
    with pytest.raises(UnsupportedModelError, match="supported are gemma3_text, llama, mistral"):
        export(source, tmp_path / "bundles" / "bundle")
    (source.path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        export(source, tmp_path / "bundles" / "bundle")
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_tokenizer_that_no_answer_could_be_read_with(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.decoder = decoders.WordPiece()
    checkpoint = dataclasses.replace(tiny_checkpoint(), tokenizer_json=tokenizer.to_str())
    source = write_folder(tmp_path / "source", checkpoint)
    with pytest.raises(UnsupportedModelError, match=r"decodes with .*WordPiece"):
        export(source, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("short_texts")
class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(build_app(), ["export", *arguments])

    def test_says_what_it_made(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        bundle = tmp_path / "bundle"
        result = self.run(str(tiny_source.path), "--output", str(bundle), "--max-kl", "9")
        assert result.exit_code == 0
        manifest = open_bundle(bundle).manifest
        assert manifest.quality is not None
        assert result.stdout.startswith(f"{bundle}: checkpoint, int8, ")
        assert f"perplexity {manifest.quality.perplexity:.2f}" in result.stdout
        assert f"KL {manifest.quality.kl_mean:.4f} mean" in result.stdout
        assert "of verification.txt" in result.stdout

    def test_json_is_the_manifest(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        bundle = tmp_path / "bundle"
        result = self.run(str(tiny_source.path), "-o", str(bundle), "--precision", "fp32", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout) == json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--precision", "int3"], "precision is 'int3'"),
            (["--max-kl", "-1"], "max_kl is -1.0"),
            (["--max-kl", "0"], "the quality gate is 0"),
        ],
    )
    def test_errors(
        self, arguments: list[str], message: str, tiny_source: SourceFiles, tmp_path: Path
    ) -> None:
        result = self.run(str(tiny_source.path), "--output", str(tmp_path / "bundle"), *arguments)
        assert result.exit_code == 1
        assert "error: " in result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_source_that_is_not_there(self, tmp_path: Path) -> None:
        result = self.run(str(tmp_path / "nothing"), "--output", str(tmp_path / "bundle"))
        assert result.exit_code == 1
        assert str(tmp_path / "nothing") in result.stderr
        assert list(tmp_path.iterdir()) == []


def test_needs_no_torch(tiny_source: SourceFiles, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pocketlm.hub import fetch_source\n"
        "from pocketlm_exporters.export import export\n"
        "export(fetch_source(sys.argv[1]), Path(sys.argv[2]), max_kl=9.0)\n"
        "print(*{'torch', 'transformers', 'tensorflow', 'jax', 'onnx', 'fastapi'} & sys.modules.keys())\n"
    )
    arguments = [sys.executable, "-c", script, str(tiny_source.path), str(tmp_path / "bundle")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() in {"", "onnx"}  # onnx_ir may stand on it
    assert open_bundle(tmp_path / "bundle").manifest.precision.name == "int8"
