"""Greedy decoding with a causal language model in transformers' interface, which optimum's models share.

The library's `generate` is left out: this loop puts token ids in, takes the likeliest token out and hands the
cache on, which is the least that has to be done.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketlm_benchmarks.engines.arrivals import trace_of
from pocketlm_benchmarks.engines.protocol import Query, Trace


class CausalLM:
    """Answers queries together: shorter prompts are padded on the left and the padding is masked."""

    def __init__(self, model: Any, tokenizer: Any, *, all_logits: bool = False) -> None:
        """`tokenizer` is one of the package tokenizers. `all_logits`: the model cannot compute the last
        position's logits alone."""
        self._torch: Any = importlib.import_module("torch")
        self._model = model
        self._tokenizer = tokenizer
        self._options = {} if all_logits else {"logits_to_keep": 1}

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        handed_over_s = time.perf_counter()
        token_ids: list[list[int]] = [[] for _ in queries]
        arrivals_s: list[list[float]] = [[] for _ in queries]
        texts = [""] * len(queries)
        for step in self._steps(queries):
            for row, token_id in enumerate(step):
                if len(token_ids[row]) == queries[row].new_tokens:
                    continue
                token_ids[row].append(token_id)
                # The whole answer again with each token, as transformers' own TextStreamer does it.
                texts[row] = self._tokenizer.decode(token_ids[row], skip_special_tokens=False)
                arrivals_s[row].append(time.perf_counter())
        return [
            trace_of(query, handed_over_s=handed_over_s, arrivals_s=arrivals, text=text)
            for query, arrivals, text in zip(queries, arrivals_s, texts, strict=True)
        ]

    def _steps(self, queries: Sequence[Query]) -> Any:
        """Yields the likeliest token of each query, as many times as the longest answer has tokens."""
        torch = self._torch
        longest = max(len(query.prompt_ids) for query in queries)
        pads = [longest - len(query.prompt_ids) for query in queries]
        ids = torch.tensor(
            [[0] * pad + [*query.prompt_ids] for pad, query in zip(pads, queries, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        for _ in range(max(query.new_tokens for query in queries)):
            with torch.inference_mode():
                output = self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    **self._options,
                )
                cache = output.past_key_values
                ids = output.logits[:, -1].argmax(-1, keepdim=True)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
                positions = positions[:, -1:] + 1
            yield ids[:, 0].tolist()


def read_tokenizer(folder: Path, **options: Any) -> Any:
    """The folder's tokenizer (`tokenizers.Tokenizer`); with `gguf_file` among the options that file's."""
    path = folder / "tokenizer.json"
    if path.is_file() and not options:
        return importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, **options
    ).backend_tokenizer
