"""The int4 precision, from the matrix product to the bundle."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from helpers.tiny import (
    Array,
    dimensions_of,
    float_session,
    random_ids,
    read_weights,
    run,
    tiny_bundle,
    tiny_checkpoint,
)
from pocketlm.bundle import open_bundle
from pocketlm.cli import build_app
from pocketlm.errors import QualityGateError
from pocketlm.manifest import GraphIO, Manifest, read_manifest
from pocketlm.session import Session, open_graph
from pocketlm.sources import SourceFiles
from pocketlm_exporters import texts
from pocketlm_exporters.architectures import architecture_of
from pocketlm_exporters.decoder import Linear
from pocketlm_exporters.export import export
from pocketlm_exporters.graph.builder import GraphBuilder
from pocketlm_exporters.graph.linear import NibbleLinear
from pocketlm_exporters.quantize import four_bits
from pocketlm_exporters.quantize.gptq import gptq, loss
from pocketlm_exporters.quantize.nibbles import fit_grid, pack
from pocketlm_exporters.quantize.recorded_inputs import RecordedInputs

LINEARS = [f"layers.{n}.{kind}" for n in (0, 1) for kind in ("qkv", "output", "gate_up", "down")]


def normal(outputs: int, inputs: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to calibrate and verify on, where the figures do not matter."""
    whole = texts.windows
    monkeypatch.setattr(texts, "windows", lambda *arguments: whole(*arguments)[:1])


@pytest.fixture(scope="module")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), "int4")


def precisions(manifest: Manifest) -> dict[str, str]:
    return {layer.path: layer.precision for layer in manifest.precision.layers}


# The product


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(32, 8), (33, 5), (40, 16), (64, 1), (96, 33), (200, 3), (576, 40)]
)
@pytest.mark.parametrize("rows", [1, 5])
def test_product(inputs: int, outputs: int, rows: int, tmp_path: Path) -> None:
    weight, x, bias = normal(outputs, inputs), normal(rows, inputs, 1), normal(1, outputs, 2)[0]
    weight[0, :32] += 3  # a block without a zero in the middle of its range
    grid = fit_grid(weight, np.ones(inputs, np.float32))
    codes = grid.nearest(weight)
    g = GraphBuilder("linear")
    value = g.input("x", ir.DataType.FLOAT, (1, "rows", inputs))
    product = NibbleLinear(pack(weight, codes, grid), inputs, bias)(g, value, "linear")
    g.output(product, "y", ir.DataType.FLOAT, (1, "rows", None))
    g.save(tmp_path, "linear.onnx", "linear.onnx.data")
    y = open_graph(tmp_path / "linear.onnx", 2).run(["y"], {"x": x[None]})[0][0]
    restored = grid.values(codes).astype(np.float64)
    # Activations may be rounded to eight bits in each block.
    padded = np.pad(x, ((0, 0), (0, -inputs % 32))).reshape(rows, -1, 32)
    steps = (np.abs(padded).max(axis=-1) / 127).repeat(32, axis=1)[:, :inputs]
    bound = 0.501 * steps @ np.abs(restored).T + 1e-4
    assert (np.abs(y - (x @ restored.T + bias)) <= bound).all()


# The recipe


def test_recorded_inputs_are_one_gram_matrix(tmp_path: Path) -> None:
    record = RecordedInputs(tmp_path)
    parts = normal(7, 5), normal(1, 5, 1), np.asfortranarray(normal(30, 5, 2))
    for rows in parts:
        record.add("layers.0.qkv", rows)
        record.add("layers.0.down", rows[:, :2])
    together = np.concatenate(parts)
    np.testing.assert_allclose(record.gram("layers.0.qkv", 5), together.T @ together, rtol=1e-5, atol=1e-5)
    assert record.gram("layers.0.down", 2).shape == (2, 2)


def test_damage_is_the_share_of_the_output_that_is_lost() -> None:
    weight, rows = normal(12, 64), normal(300, 64, 1)
    rounded = four_bits.round_linear(weight, rows.T @ rows)
    assert 0.0005 < rounded.damage < 0.02
    with_zeros = four_bits.round_linear(np.zeros_like(weight), rows.T @ rows)
    assert (with_zeros.damage, with_zeros.weight.worst_error) == (0, 0)


def test_the_most_damaged_linears_become_finer_first() -> None:
    gram = np.eye(32, dtype=np.float32)
    flat, spread = np.full((4, 32), 0.5, np.float32), normal(4, 32)
    rounded = {
        "layers.0.qkv": four_bits.round_linear(flat, gram),
        "layers.0.down": four_bits.round_linear(spread, gram),
    }
    assert four_bits.by_damage(rounded) == ["layers.0.down", "layers.0.qkv"]


def test_calibration_lowers_the_loss_on_rows_that_it_has_not_seen() -> None:
    random = np.random.default_rng(0)
    mixing = random.standard_normal((64, 64)) * 10.0 ** random.uniform(-1, 1, 64)
    seen, unseen = (
        (random.standard_normal((tokens, 64)) @ mixing).astype(np.float32) for tokens in (400, 4000)
    )
    weight = normal(50, 64)
    plain = fit_grid(weight, np.ones(64, np.float32))
    nearest = loss(weight - plain.values(plain.nearest(weight)), unseen.T @ unseen).sum()
    gram = seen.T @ seen
    grid = fit_grid(weight, np.diagonal(gram))
    calibrated = loss(weight - grid.values(gptq(weight, gram, grid)), unseen.T @ unseen).sum()
    assert calibrated < 0.6 * nearest


# The bundle


def test_the_manifest_states_facts(int4_bundle: Path, fp32_bundle: Path) -> None:
    manifest, reference = open_bundle(int4_bundle).manifest, read_manifest(fp32_bundle)
    assert manifest.precision.name == "int4"
    assert precisions(manifest) == {
        "embedding": "int8-block32",
        **dict.fromkeys(LINEARS, "int4-block32"),
        "head": "int8-block32",
    }
    assert manifest.precision.recipe == (
        "GPTQ, four bits in blocks of 32 with zero points; embedding and head in eight"
    )
    worst = {layer.path: layer.worst_error for layer in manifest.precision.layers}
    assert all(0.01 < worst[path] < 0.5 for path in LINEARS)
    assert manifest.calibration is not None
    assert (manifest.calibration.text, manifest.calibration.smoothing) == ("calibration.txt", None)
    assert manifest.quality is not None
    assert reference.quality is not None
    assert 0 < manifest.quality.kl_mean < 0.1
    assert manifest.quality.perplexity_fp32 == pytest.approx(reference.quality.perplexity, rel=1e-6)
    assert {path.name for path in int4_bundle.iterdir()} == {*manifest.files, "manifest.json"}


def test_the_graph_computes_what_its_weights_say(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(biases=True)
    weights = read_weights(checkpoint)
    # Independent inputs of one size: GPTQ rounds to nearest then.
    rounded = four_bits.round_linears(
        weights, lambda path: np.eye(weights.linears[path].inputs, dtype=np.float32), lambda done, total: None
    )
    quantized = four_bits.quantize(weights, rounded, ["layers.0.down"])
    decoder = architecture_of(checkpoint).decoder
    decoder(weights, quantized.embedding, quantized.linears, GraphIO()).save(tmp_path, "model.onnx", "data")
    session = Session(tmp_path / "model.onnx", dimensions_of(weights), GraphIO(), threads=1)

    def restored(path: str, linear: Linear) -> Linear:
        weight = linear.weight()
        if path in {"layers.0.down", "head"}:
            return linear
        grid = fit_grid(weight, np.ones(linear.inputs, np.float32))
        values = grid.values(grid.nearest(weight))
        return dataclasses.replace(linear, weight=lambda: values)

    linears = {path: restored(path, linear) for path, linear in weights.linears.items()}
    reference = float_session(checkpoint, dataclasses.replace(weights, linears=linears), tmp_path / "float")
    ids = random_ids(60)
    exact = run(reference, ids)
    # What is left is the rounding of activations, and that of embedding, head and one linear to eight bits.
    assert 0 < np.abs(run(session, ids) - exact).mean() < 0.02 * exact.std()


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize(
    "variant",
    [
        {"tie_word_embeddings": True, "biases": True},
        {"num_key_value_heads": 4, "head_dim": 48, "hidden_size": 40, "intermediate_size": 33},
    ],
    ids=["tied, biases", "odd sizes"],
)
def test_other_models_keep_their_quality(variant: dict[str, Any], tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle(tmp_path, "int4", checkpoint=tiny_checkpoint(**variant))).manifest
    assert manifest.quality is not None
    assert manifest.quality.kl_mean < 0.1


@pytest.mark.usefixtures("short_texts")
class TestGate:
    def test_a_strict_gate_is_met_with_eight_bits(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        lenient = export(tiny_source, tmp_path / "lenient", precision="int4", max_kl=math.inf)
        assert lenient.quality is not None
        gate = 0.7 * lenient.quality.kl_mean
        strict = export(tiny_source, tmp_path / "strict", precision="int4", max_kl=gate)
        assert strict.quality is not None
        assert strict.quality.kl_mean <= gate
        finer = [path for path in LINEARS if precisions(strict)[path] == "int8-block32"]
        assert len(finer) in {4, 8}
        assert f"so are the {len(finer)} most sensitive linears" in strict.precision.recipe
        assert strict.bytes > lenient.bytes
        assert strict == read_manifest(tmp_path / "strict")

    def test_an_impossible_gate_leaves_nothing(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        message = r"int4 diverges .* at best, the quality gate is 0\. .*--precision int8"
        with pytest.raises(QualityGateError, match=message):
            export(tiny_source, tmp_path / "bundle", precision="int4", max_kl=0.0)
        assert list(tmp_path.iterdir()) == []

    def test_the_same_bytes_again(self, tiny_source: SourceFiles, tmp_path: Path) -> None:
        first, second = (
            export(tiny_source, tmp_path / name, precision="int4", max_kl=9.0) for name in ("1", "2")
        )
        assert first.files == second.files

    @pytest.mark.parametrize("task", ["Calibrating", "Quantizing", "Writing the int4 graph"])
    def test_an_interrupted_export_leaves_nothing(
        self, task: str, tiny_source: SourceFiles, tmp_path: Path
    ) -> None:
        def interrupt(now: str, done: int, total: int, unit: str) -> None:
            if now == task:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(tiny_source, tmp_path / "bundle", precision="int4", progress=interrupt)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_texts")
def test_the_command(tiny_source: SourceFiles, tmp_path: Path) -> None:
    arguments = [str(tiny_source.path), "--output", str(tmp_path / "bundle"), "--precision", "int4"]
    result = CliRunner().invoke(build_app(), ["export", *arguments])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{tmp_path / 'bundle'}: checkpoint, int4, ")
    shown = CliRunner().invoke(build_app(), ["show", str(tmp_path / "bundle")])
    assert "smoothing" not in shown.stdout
    assert "calibration.txt" in shown.stdout
