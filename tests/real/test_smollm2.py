"""SmolLM2-135M-Instruct, the real weights: what the README promises of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pocketlm
from pocketlm.manifest import read_manifest

pytestmark = pytest.mark.real

QUESTION = "Why is the sky blue?"
# What the fp32 graph answers too.
GOLDEN = "The answer to this question lies in the intricate dance of light and color."

PROMPTS = [
    QUESTION,
    "Write a short letter that thanks a neighbour for watering the plants.",
    "List three uses of vinegar in the house.",
    "def fibonacci(n):",
    "Résume en une phrase : le chat dort sur le canapé. 🐈",
]


def test_quality_is_measured_and_within_the_promise(bundle_folder: Path) -> None:
    manifest = read_manifest(bundle_folder)
    quality = manifest.quality
    assert quality is not None
    assert manifest.calibration is not None
    assert manifest.calibration.text != quality.text
    assert quality.kl_mean <= 0.015
    assert quality.top1_agreement >= 0.92
    assert quality.perplexity == pytest.approx(quality.perplexity_fp32, rel=0.02)


def test_golden_greedy_text(model: pocketlm.Model) -> None:
    assert model.generate(QUESTION, max_tokens=16).text.startswith(GOLDEN)


def test_an_answer_ends_by_itself(model: pocketlm.Model) -> None:
    completion = model.generate("What is the capital of France? Answer with one word.")
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_cached_prefix_does_not_change_the_answer(bundle_folder: Path, prompt: str) -> None:
    with pocketlm.load(bundle_folder, context_length=1024) as fresh:
        first = fresh.generate(prompt, max_tokens=48, temperature=0.8, seed=7)
        again = fresh.generate(prompt, max_tokens=48, temperature=0.8, seed=7)
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 2
    assert again.text == first.text


def test_a_second_turn_equals_a_fresh_run_over_the_conversation(
    model: pocketlm.Model, bundle_folder: Path
) -> None:
    chat = model.chat(system="You answer in one sentence.")
    chat.send("Name a planet with rings.", max_tokens=40)
    while model._scheduler._unsettled:  # what a person's reading is long enough for
        time.sleep(0.01)
    asked = [*chat.messages, pocketlm.Message(role="user", content="And one without?")]
    second = chat.send("And one without?", max_tokens=40)
    with pocketlm.load(bundle_folder, context_length=2048) as fresh:
        expected = fresh.generate(asked, max_tokens=40)
    assert second.text == expected.text
    assert second.usage.prompt_tokens == expected.usage.prompt_tokens
    # Only the user's new message and the template around it were computed.
    assert second.usage.prompt_tokens - second.usage.cached_tokens < 25


@pytest.mark.parametrize("size", [2, 7, 64])
def test_chunks_give_the_same_logits_to_the_last_bit(model: pocketlm.Model, size: int) -> None:
    ids = model.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 20)[:196]
    session = model._open_session()
    cache = session.new_cache(2048)
    for start in range(0, len(ids), size):
        logits = session.forward(ids[start : start + size], cache)
    assert (logits[0] == model.logits(ids)[-1]).all()


def test_the_command_line_answers_in_json(bundle_folder: Path) -> None:
    command = [sys.executable, "-m", "pocketlm", "run", str(bundle_folder), QUESTION]
    done = subprocess.run(
        [*command, "--max-tokens", "16", "--json"], capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["text"].startswith(GOLDEN)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["finish_reason"] == "length"
    assert answer["timings"]["ttft_s"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_under_300_mb(bundle_folder: Path) -> None:
    script = (
        "import pathlib, pocketlm\n"
        f"model = pocketlm.load({str(bundle_folder)!r}, context_length=1024)\n"
        "model.generate('word ' * 900, raw=True, max_tokens=32, ignore_eos=True)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(next(line.split()[1] for line in status.splitlines() if line.startswith('VmRSS')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 300e6
