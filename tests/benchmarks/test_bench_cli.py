"""`pocketlm bench` and its sisters: what they write where, and how they end."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.results import a_model, a_result
from pocketlm.cli import build_app
from pocketlm.errors import MissingExtraError, StorageError
from pocketlm_benchmarks import harness
from pocketlm_benchmarks import result as result_module
from pocketlm_benchmarks.cli import EXIT_REGRESSION
from pocketlm_benchmarks.engines.registry import PeerSpec
from pocketlm_benchmarks.harness import Options
from pocketlm_benchmarks.peaks import Peaks
from pocketlm_benchmarks.result import Result, parse_result, read_result, write_result


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(build_app(), ["bench", *map(str, arguments)])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Options]]:
    """What the harness is asked for; it answers at once."""
    calls: list[tuple[str, Options]] = []

    def bench(model: str, options: Options, **_: Any) -> Result:
        calls.append((model, options))
        return a_result()

    monkeypatch.setattr(harness, "bench", bench)
    return calls


class TestBench:
    def test_the_real_thing(self, int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the engine in its own process."""
        monkeypatch.setattr(
            harness, "measure_peaks", lambda threads, progress: Peaks(threads, 1e10, 1e11, 1e10)
        )
        sizes = ["--prompt-tokens", "16", "--new-tokens", "4", "--depth", "0,16", "--workload", "none"]
        outputs = ["--json", tmp_path / "r.json", "--html", tmp_path / "r.html", "--csv", tmp_path / "r.csv"]
        result = run(int8_bundle, *sizes, "--quick", "--threads", "1", *outputs)
        assert (result.exit_code, result.exception) == (0, None)
        written = read_result(tmp_path / "r.json")
        assert [case.name for case in written.cases] == ["pp16", "tg4", "tg4@d16"]
        assert written.command.startswith(f"pocketlm bench {int8_bundle.name} --prompt-tokens 16")
        memory = written.engines[0].memory
        assert memory is not None
        assert memory.peak_bytes is None or memory.peak_bytes > 10 << 20
        assert written.settings.rounds == 3
        assert "tg4@d16" in result.stdout
        assert "KL" in result.stdout
        assert "<html" in (tmp_path / "r.html").read_text()
        assert "tg4@d16" in (tmp_path / "r.csv").read_text()

    def test_defaults(self, asked: list[tuple[str, Options]]) -> None:
        assert run("smollm2-135m").exit_code == 0
        model, options = asked[0]
        assert model == "smollm2-135m"
        assert options == Options(command="pocketlm bench smollm2-135m")

    def test_every_option_arrives(self, asked: list[tuple[str, Options]], tmp_path: Path) -> None:
        gguf = tmp_path / "model.gguf"
        gguf.write_bytes(b"GGUF")
        arguments: list[str | Path] = ["m", "--precision", "int8", "--prompt-tokens", "128,2048"]
        arguments += ["--new-tokens", "32", "--depth", "none", "--workload", "chat", "--workload", "batch"]
        arguments += ["--repetitions", "7", "--threads", "3", "--seed", "5", "--no-energy", "--sustain", "2m"]
        arguments += ["--against", f"llama.cpp={gguf},server=http://127.0.0.1:8080/v1#m"]
        arguments += ["--against", f"llama-bench={gguf}", "--llama-bench", "/bin/llama-bench"]
        arguments += ["--peer-python", "llama.cpp=/venv/bin/python", "--quality", "t.txt", "--cross-check"]
        arguments += ["--reference", "fp32", "--meter", "log.csv"]
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert asked[0][1] == Options(
            precision="int8",
            prompt_tokens=(128, 2048),
            new_tokens=32,
            depths=(),
            workloads=("chat", "batch"),
            peers=(
                PeerSpec("llama.cpp", str(gguf)),
                PeerSpec("server", "http://127.0.0.1:8080/v1#m"),
                PeerSpec("llama-bench", str(gguf)),
            ),
            peer_pythons={"llama.cpp": "/venv/bin/python"},
            llama_bench="/bin/llama-bench",
            rounds=7,
            threads=3,
            seed=5,
            energy=False,
            meter_log=Path("log.csv"),
            cross_check=True,
            quality_text=Path("t.txt"),
            reference=Path("fp32"),
            sustain_s=120,
            command=asked[0][1].command,
        )
        assert asked[0][1].command.startswith("pocketlm bench m --precision int8 ")

    def test_the_command_names_no_folder_of_the_machine(
        self, asked: list[tuple[str, Options]], tmp_path: Path
    ) -> None:
        gguf = tmp_path / "model, 2=2.gguf"
        gguf.write_bytes(b"GGUF")
        against = f"llama.cpp={gguf},llama-bench={gguf},server=http://127.0.0.1:8080/v1"
        text = tmp_path / "letter.txt"
        run(tmp_path / "bundle", f"--quality={text}", "--reference", tmp_path, "--against", against)
        assert shlex.split(asked[0][1].command) == [
            *(
                "pocketlm",
                "bench",
                "bundle",
                "--quality=letter.txt",
                "--reference",
                tmp_path.name,
                "--against",
            ),
            "llama.cpp=model, 2=2.gguf,llama-bench=model, 2=2.gguf,server=http://127.0.0.1:8080/v1",
        ]

    def test_an_output_that_fails_leaves_the_others(
        self, asked: list[tuple[str, Options]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr(result_module, "write_result", full)
        result = run("m", "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
        assert result.exit_code == 1
        assert "the disk is full" in result.stderr
        assert "pp512" in result.stdout
        assert "pp512" in (tmp_path / "r.csv").read_text()

    def test_a_folder_that_cannot_be_written_shows_at_once(
        self, asked: list[tuple[str, Options]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        result = run("m", "--json", tmp_path / "r.json")
        assert "cannot be written" in " ".join(result.stderr.split())
        assert asked == []

    def test_all_workloads(self, asked: list[tuple[str, Options]]) -> None:
        run("m", "--workload", "all")
        assert set(asked[0][1].workloads or ()) == {
            "chat", "summarize", "extract", "code-edit", "retrieval", "batch"
        }  # fmt: skip

    def test_a_quick_run_has_no_energy(self, asked: list[tuple[str, Options]]) -> None:
        run("m", "--quick", "--repetitions", "2")
        assert (asked[0][1].rounds, asked[0][1].energy, asked[0][1].quick) == (2, False, True)

    def test_json_on_standard_output_is_all_there_is(self, asked: list[tuple[str, Options]]) -> None:
        result = run("m", "--json", "-")
        assert parse_result(json.loads(result.stdout), where="stdout") == a_result()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--prompt-tokens", "many"], "whole numbers"),
            (["--depth", "1,,2"], "whole numbers"),
            (["--against", "lama.cpp=x"], "llama.cpp"),
            (["--peer-python", "openvino"], "PEER=VALUE"),
            (["--sustain", "long"], "10m"),
            (["--json", "-", "--csv", "-"], "standard output"),
            (["--json", "no/such/folder/r.json"], "cannot be written"),
            (["--html", "."], "cannot be written"),
            (["--html", "page", "--csv", "./page"], "page is named for two outputs"),
        ],
    )
    def test_nonsense_is_refused_before_anything_is_measured(
        self, asked: list[tuple[str, Options]], arguments: Sequence[str], message: str
    ) -> None:
        result = run("m", *arguments)
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())
        assert asked == []

    def test_help_is_that_of_measuring(self) -> None:
        for arguments in ([], ["--help"]):
            result = run(*arguments)
            assert "--against" in result.output or "MODEL" in result.output
        assert "bench compare" in " ".join(run("--help").stdout.split())

    def test_without_its_packages_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.delitem(sys.modules, "pocketlm_benchmarks.harness")
        monkeypatch.setitem(sys.modules, "psutil", None)
        monkeypatch.delitem(sys.modules, "pocketlm_benchmarks.conditions")
        result = run("m")
        assert result.exit_code == 1
        assert str(MissingExtraError("pocketlm bench", "bench")) in " ".join(result.stderr.split())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same run, and one that is half as fast."""
    paths = {}
    for name, result in {"same": a_result(), "slow": a_result(faster=0.5)}.items():
        paths[name] = tmp_path / f"{name}.json"
        write_result(result, paths[name])
    return paths


class TestCompare:
    def test_no_change(self, files: dict[str, Path]) -> None:
        result = run("compare", files["same"], files["same"])
        assert result.exit_code == 0
        assert "pp512" in result.stdout

    def test_a_regression_ends_with_its_own_code(self, files: dict[str, Path]) -> None:
        assert run("compare", files["same"], files["slow"]).exit_code == EXIT_REGRESSION
        assert run("compare", files["slow"], files["same"]).exit_code == 0

    def test_within_the_tolerance_it_is_none(self, files: dict[str, Path]) -> None:
        # Half the rate takes twice the time: a loss of 100 %, more than any tolerance.
        assert run("compare", files["same"], files["slow"], "--tolerance", "99%").exit_code in (
            0,
            EXIT_REGRESSION,
        )
        assert run("compare", files["same"], files["same"], "--tolerance", "0").exit_code == 0

    def test_json(self, files: dict[str, Path]) -> None:
        result = run("compare", files["same"], files["slow"], "--json")
        comparison = json.loads(result.stdout)
        assert any(change["regression"] for change in comparison["changes"])
        assert comparison["tolerance"] == 0.05

    def test_nothing_to_compare_is_no_success(self, tmp_path: Path, files: dict[str, Path]) -> None:
        import dataclasses

        same = a_result()
        other = dataclasses.replace(
            same, cases=[dataclasses.replace(case, sha256="f" * 64) for case in same.cases]
        )
        write_result(other, tmp_path / "other.json")
        assert run("compare", files["same"], tmp_path / "other.json").exit_code == 1

    @pytest.mark.parametrize("tolerance", ["much", "-1", "100"])
    def test_tolerance(self, files: dict[str, Path], tolerance: str) -> None:
        result = run("compare", files["same"], files["same"], f"--tolerance={tolerance}")
        assert result.exit_code == 1
        assert "--tolerance" in result.stderr

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "not the result of a benchmark"),
            ('{"format_version": 99}', "format version 99"),
            ('{"format_version": 1}', "bench-schema.json at"),
        ],
    )
    def test_what_is_no_result(
        self, tmp_path: Path, files: dict[str, Path], content: str, message: str
    ) -> None:
        (tmp_path / "bad.json").write_text(content)
        result = run("compare", files["same"], tmp_path / "bad.json")
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())

    def test_a_file_that_is_not_there(self, tmp_path: Path, files: dict[str, Path]) -> None:
        assert run("compare", files["same"], tmp_path / "nothing.json").exit_code == 1


class TestReport:
    def test_several_results_on_one_page(self, tmp_path: Path, files: dict[str, Path]) -> None:
        write_result(a_result(model=a_model("tiny-other", "fp32")), tmp_path / "other.json")
        result = run("report", files["same"], tmp_path / "other.json", "--html", tmp_path / "page.html")
        assert result.exit_code == 0, result.output
        assert "tiny-other" in (tmp_path / "page.html").read_text()
        assert "tiny-other" in result.stdout

    @pytest.mark.parametrize("kind", ["--markdown", "--csv", "--html"])
    def test_on_standard_output(self, files: dict[str, Path], kind: str) -> None:
        result = run("report", files["same"], kind, "-")
        assert "pp512" in result.stdout
        assert result.stdout[0] in '#|<"dcr'


class TestJoin:
    def log(self, path: Path, result: Result, power_w: float) -> Path:
        times = [block.started_unix_s for each in result.measurements for block in each.blocks]
        assert result.energy is not None
        times += [window.started_unix_s for window in result.energy.idle]
        start, stop = int(min(times)) - 5, int(max(times)) + 200
        lines = ["timestamp,power_w", *(f"{second},{power_w}" for second in range(start, stop))]
        path.write_text("\n".join(lines) + "\n")
        return path

    def test_the_meters_joules_take_the_place_of_the_estimate(
        self, tmp_path: Path, files: dict[str, Path]
    ) -> None:
        before = a_result()
        log = self.log(tmp_path / "log.csv", before, 12.0)
        result = run("join", files["same"], "--meter", log, "--json", tmp_path / "joined.json")
        assert result.exit_code == 0, result.output
        joined = read_result(tmp_path / "joined.json")
        assert joined.energy is not None
        assert (joined.energy.scope, joined.energy.kind) == ("wall", "measured")
        assert [window.power_w for window in joined.energy.idle] == [
            pytest.approx(12.0) for _ in joined.energy.idle
        ]
        for each in joined.measurements:
            for block in each.blocks:
                assert block.energy_j == pytest.approx(12 * block.duration_s)
            if each.blocks:
                assert each.energy is not None
                assert each.energy.marginal_j is not None
                assert each.energy.marginal_j.value == pytest.approx(0, abs=1e-6)
        assert not [ratio for ratio in joined.ratios if ratio.metric == "energy_j"]
        assert joined.measurements[0].metrics == before.measurements[0].metrics

    def test_a_log_of_another_day_leaves_no_figures(self, tmp_path: Path, files: dict[str, Path]) -> None:
        (tmp_path / "log.csv").write_text("0,5\n1,5\n2,5\n")
        run("join", files["same"], "--meter", tmp_path / "log.csv", "--json", tmp_path / "joined.json")
        joined = read_result(tmp_path / "joined.json")
        assert all(each.energy is None for each in joined.measurements)
        assert all("no energy" in block.flags[-1] for each in joined.measurements for block in each.blocks)

    def test_blocks_too_short_for_the_meter_are_flagged(self, tmp_path: Path, files: dict[str, Path]) -> None:
        log = self.log(tmp_path / "log.csv", a_result(), 12.0)
        run("join", files["same"], "--meter", log, "--json", tmp_path / "joined.json")
        blocks = [b for each in read_result(tmp_path / "joined.json").measurements for b in each.blocks]
        for block in blocks:
            short = [flag for flag in block.flags if "needs 60 s" in flag]
            assert len(short) == (block.duration_s < 60)
        assert any(block.duration_s < 60 for block in blocks)

    def test_the_log_is_read_once(
        self, tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[Path] = []

        def read_text(path: Path, **_: Any) -> str:
            if path == log:
                read.append(path)
            return path.read_bytes().decode()

        log = self.log(tmp_path / "log.csv", a_result(), 12.0)
        monkeypatch.setattr(Path, "read_text", read_text)
        assert run("join", files["same"], "--meter", log).exit_code == 0
        assert read == [log]

    def test_a_run_without_idle_windows(self, tmp_path: Path) -> None:
        import dataclasses

        write_result(dataclasses.replace(a_result(), energy=None), tmp_path / "r.json")
        (tmp_path / "log.csv").write_text("0,5\n1,5\n")
        result = run("join", tmp_path / "r.json", "--meter", tmp_path / "log.csv")
        assert result.exit_code == 1
        assert "--no-energy" in result.stderr
