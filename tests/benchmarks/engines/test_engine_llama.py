"""llama.cpp's two adapters, on stand-ins that behave as the real binding and program were seen to."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pocketlm_benchmarks.engines.llama_bench import LlamaBench
from pocketlm_benchmarks.engines.llama_cpp import LlamaCpp
from pocketlm_benchmarks.engines.protocol import EngineError, EngineMissingError, EngineSpec, Message, Query

VOCABULARY = 8
SYSTEM_INFO = b"CPU : SSE3 = 1 | AVX2 = 1 | AMX_INT8 = 0 | REPACK = 1 | "


class FakeLlama:
    """The likeliest token behind n tokens of cache is n modulo the vocabulary."""

    def __init__(self, model_path: str, **settings: Any) -> None:
        self.settings = settings
        self.metadata = {"general.file_type": "7"} if "q8" in model_path else {}
        self.model, self.closed = object(), False
        self.evaluated: list[list[int]] = []
        self.cached = 99

    ctx = property(lambda self: self)

    def reset(self) -> None:
        self.cached = 0

    def eval(self, tokens: Any) -> None:
        self.evaluated.append(list(tokens))
        self.cached += len(tokens)

    def n_vocab(self) -> int:
        return VOCABULARY

    def detokenize(self, tokens: list[int]) -> bytes:
        # Tokens 4 and 5 are the halves of one character.
        return {4: b"\xc3", 5: b"\xbc"}.get(tokens[0], f"<{tokens[0]}>".encode())

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("llama_cpp")
    module.__version__ = "0.3.36"
    module.Llama = FakeLlama
    module.LLAMA_FTYPE_ALL_F32 = 0
    module.LLAMA_FTYPE_MOSTLY_Q8_0 = 7
    module.LLAMA_OTHER_SEVEN = 7
    module.llama_model_size = lambda model: 1234
    module.llama_print_system_info = lambda: SYSTEM_INFO
    module.llama_get_logits_ith = last_logits
    monkeypatch.setitem(sys.modules, "llama_cpp", module)


def last_logits(llama: FakeLlama, index: int) -> Any:
    assert index == -1
    logits = np.zeros(VOCABULARY, np.float32)
    logits[llama.cached % VOCABULARY] = 1
    llama.logits = logits  # type: ignore[attr-defined]  # to keep it alive
    return logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def llama_cpp(weights: str = "q8.gguf") -> LlamaCpp:
    return LlamaCpp(EngineSpec("llama.cpp", weights, threads=3, context_length=64))


@pytest.mark.usefixtures("binding")
def test_llama_cpp_says_what_it_is() -> None:
    engine = llama_cpp()
    assert (engine.info.name, engine.info.version) == ("llama.cpp", "llama-cpp-python 0.3.36")
    assert (engine.info.precision, engine.info.weight_bytes) == ("Q8_0", 1234)
    assert engine.info.sampling_included
    assert engine.info.note.endswith("flash attention on, KV cache in 16 bits, built with SSE3, AVX2, REPACK")
    settings = engine._llm.settings
    assert (settings["n_ctx"], settings["n_threads"], settings["n_threads_batch"]) == (64, 3, 3)
    assert (settings["flash_attn"], settings["n_gpu_layers"]) == (True, 0)
    assert llama_cpp("other.gguf").info.precision == "unknown"


@pytest.mark.usefixtures("binding")
def test_llama_cpp_decodes_greedily_from_an_empty_cache() -> None:
    engine = llama_cpp()
    first, second = engine.answer([Query((1, 2, 3), 4), Query((7,), 1)])
    # Three tokens are followed by token 3, four by token 4 …; the last one is not put in again.
    assert engine._llm.evaluated == [[1, 2, 3], [3], [4], [5], [7]]
    assert (first.text, second.text) == ("<3>ü<6>", "<1>")
    assert (first.prompt_tokens, first.cached_tokens, first.new_tokens, first.decode_tokens) == (3, 0, 4, 3)
    assert first.decode_s == pytest.approx(sum(first.gaps_s))
    assert len(first.gaps_s) == 3
    assert (second.decode_s, second.gaps_s) == (None, ())
    assert first.prefill_s is not None
    assert second.prefill_s is not None
    assert second.prefill_s > first.prefill_s > 0  # both were handed over at the same time
    engine.close()
    assert engine._llm.closed


def test_llama_cpp_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(EngineMissingError, match=r"Install it with: pip install llama-cpp-python"):
        llama_cpp()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Prints as llama-bench does, one millisecond for each token, and notes how it was called."""
    if sys.platform == "win32":
        pytest.skip("a script stands in for the program")
    path = tmp_path / "llama-bench"
    path.write_text(f"#!{sys.executable}\n{PROGRAM}", encoding="utf-8")
    path.chmod(0o755)
    return path


PROGRAM = """
import json, pathlib, sys
arguments = sys.argv[1:]
with pathlib.Path(__file__).with_name("calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
value = dict(zip(arguments, arguments[1:]))
print("loading", file=sys.stderr)
if "damaged" in value["-m"]:
    sys.exit("llama_bench: error: failed to load model")
if "chatty" in value["-m"]:
    sys.exit(print("warming up"))
facts = {"build_commit": "0c1e570", "build_number": 1, "model_type": "llama 1B Q4_K - Medium"}
milliseconds = int(value["-p"]) + int(value["-n"])
print(json.dumps([{**facts, "model_size": 1234, "samples_ns": [milliseconds * 1000000]}]))
"""


def llama_bench(program: Path, weights: str = "model.gguf") -> LlamaBench:
    return LlamaBench(EngineSpec("llama-bench", weights, 3, 64, program=str(program)))


def calls(program: Path) -> list[list[str]]:
    lines = program.with_name("calls").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_llama_bench(program: Path) -> None:
    engine = llama_bench(program)
    assert (engine.info.version, engine.info.precision) == ("build 1 (0c1e570)", "Q4_K - Medium")
    assert (engine.info.weight_bytes, engine.info.sampling_included) == (1234, False)
    assert engine.info.energy_seen == "never"
    prefill, decode = engine.answer([Query((1,) * 512, 1), Query((1,) * 16, 129)])
    assert (prefill.prompt_tokens, prefill.prefill_s, prefill.decode_s) == (512, 0.512, None)
    assert (prefill.new_tokens, prefill.decode_tokens) == (1, 0)
    assert (decode.prompt_tokens, decode.prefill_s, decode.decode_s) == (16, None, 0.128)
    assert (decode.new_tokens, decode.decode_tokens, decode.gaps_s) == (129, 128, ())
    common = ["-m", "model.gguf", "-t", "3", "-dev", "none", "-fa", "1", "-r", "1", "-o", "json"]
    assert calls(program) == [
        [*common, "-p", "1", "-n", "0", "--no-warmup"],
        [*common, "-p", "512", "-n", "0"],
        [*common, "-p", "0", "-n", "128", "-d", "16"],
    ]
    engine.close()


def test_llama_bench_runs_no_prompts(program: Path) -> None:
    engine = llama_bench(program)
    with pytest.raises(EngineMissingError, match="llama-bench runs no prompts"):
        engine.answer([Query((1,), 4, (Message(role="user", content="Hi"),))])
    assert len(calls(program)) == 1  # nothing was measured


def test_llama_bench_that_fails(program: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)--no-warmup ended with exit code 1:.*failed to load model"):
        llama_bench(program, "damaged.gguf")
    with pytest.raises(EngineError, match=r"printed 'warming up\\n'; one result as JSON is expected"):
        llama_bench(program, "chatty.gguf")


def test_llama_bench_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineMissingError, match="the program llama-bench was not found"):
        LlamaBench(EngineSpec("llama-bench", "model.gguf", 1, 64))
