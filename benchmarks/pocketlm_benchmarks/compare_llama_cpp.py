"""pocketlm beside llama.cpp, in alternation within one run: medians and ratios.

    python -m pocketlm_benchmarks.compare_llama_cpp smollm2-135m --llama-bench PATH --gguf FILE [--rounds 5]

`--llama-bench` is llama.cpp's own benchmark program, `--gguf` the same weights in its format (for Q8_0 from
another type: `llama-quantize --allow-requantize IN.gguf OUT.gguf Q8_0`). Its rates leave out tokenization
and sampling; ours include sampling and detokenization. Both use the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

PROMPT, NEW = 512, 64
ROWS = ("prefill 512", "decode, empty context", "decode at 512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="as for pocketlm run")
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ours: list[tuple[float, ...]] = []
    theirs: list[tuple[float, ...]] = []
    for number in range(arguments.rounds):
        sys.stderr.write(f"round {number + 1} of {arguments.rounds}\n")
        ours.append(measure_ours(arguments.model, arguments.threads))
        theirs.append(measure_llama_cpp(arguments.llama_bench, arguments.gguf, arguments.threads))
    sys.stdout.write(
        "| tok/s | pocketlm | llama.cpp | ratio, median (lowest to highest) |\n| --- | --- | --- | --- |\n"
    )
    for row, mine, other in zip(ROWS, zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        ratios = sorted(a / b for a, b in zip(mine, other, strict=True))
        sys.stdout.write(
            f"| {row} | {statistics.median(mine):.0f} | {statistics.median(other):.0f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |\n"
        )


def measure_ours(model: str, threads: int) -> tuple[float, ...]:
    sizes = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW), "--repetitions", "3"]
    command = [sys.executable, "-m", "pocketlm", "bench", model, "--json", "--threads", str(threads)]
    report = run_json([*command, *sizes])
    return tuple(report[key]["median"] for key in ("prefill", "decode_empty", "decode_deep"))


def measure_llama_cpp(program: str, gguf: str, threads: int) -> tuple[float, ...]:
    """The better of flash attention on and off, for each rate of its own."""
    best: dict[tuple[int, int], float] = {}
    command = [program, "-m", gguf, "-t", str(threads), "-fa", "0,1", "-r", "3", "-o", "json"]
    tests = ["-p", str(PROMPT), "-n", str(NEW), "-d", "0"], ["-p", "0", "-n", str(NEW), "-d", str(PROMPT)]
    for test in tests:
        for result in run_json([*command, *test]):
            key = (result["n_prompt"], result["n_depth"])
            best[key] = max(best.get(key, 0.0), result["avg_ts"])
    return best[PROMPT, 0], best[0, 0], best[0, PROMPT]


def run_json(command: list[str]) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
