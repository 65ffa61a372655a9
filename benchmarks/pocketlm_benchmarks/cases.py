"""What is measured: a synthetic grid that is comparable with llama-bench, and workloads of real prompts.

Both become a `Work`: a case, and the queries that stand for it. The same settings give the same queries on
every machine and in every release, and `Case.sha256` tells whether two runs had the same work to do.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.engines.protocol import Message, Query
from pocketlm_benchmarks.result import Case
from pocketlm_benchmarks.workloads import load_workload

Group = tuple[Query, ...]

Encode = Callable[[Sequence[Message]], list[int]]
"""The token ids of a conversation with the model's chat template applied, as `Tokenizer.encode_chat`."""


@dataclass(frozen=True)
class Work:
    """A case and its queries.

    The queries of a group are handed over at once. Blocks take the groups in turn, round and round, so that
    no engine ever gets the same prompt twice in a row.
    """

    case: Case
    groups: tuple[Group, ...]  # at least two

    @property
    def context_length(self) -> int:
        """Tokens that its longest query takes, prompt and answer."""
        return max(len(query.prompt_ids) + query.new_tokens for group in self.groups for query in group)


def grid(
    *,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    depths: Sequence[int],
    vocabulary: int,
    seed: int,
    groups: int = 8,
    special_ids: Collection[int] = (),
) -> list[Work]:
    """A prefill case for each of `prompt_tokens` and a decode case for each of `depths`.

    They are named as in llama-bench and measure the same: `pp512` processes a prompt of 512 random tokens;
    `tg128@d512` makes 128 tokens, one by one, behind a prompt of 512. The first new token comes from the
    prompt, so a decode query asks for one more. At depth 0 the prompt is a single token.

    Ids are drawn from 0 … `vocabulary` − 1 without `special_ids`. No two prompts of a case begin with the
    same id, so that a prefix cache finds nothing. A case does not depend on the others that are asked for.

    Raises InvalidSettingError for sizes out of range or named twice, and for a vocabulary that is too small.
    """
    _check("prompt_tokens", prompt_tokens, least=1)
    _check("depths", depths, least=0)
    _check("new_tokens", [new_tokens], least=1)
    _check("groups", [groups], least=2)
    ids = sorted(set(range(vocabulary)) - set(special_ids))
    if len(ids) < groups:
        raise InvalidSettingError(
            f"the vocabulary has {len(ids)} ordinary tokens, but {groups} prompts that begin differently "
            f"need as many. Ask for {len(ids)} groups or fewer."
        )
    prompts = _RandomPrompts(ids, seed, groups)
    prefill = [
        _work(
            f"pp{size}", "prefill", prompts.draw(f"pp{size}", size, 1), f"process {_tokens(size)} of prompt"
        )
        for size in prompt_tokens
    ]
    decode = []
    for depth in depths:
        name = f"tg{new_tokens}@d{depth}" if depth else f"tg{new_tokens}"
        behind = _tokens(depth) if depth else "an empty context"
        drawn = prompts.draw(name, max(1, depth), new_tokens + 1)
        decode.append(_work(name, "decode", drawn, f"make {_tokens(new_tokens)} behind {behind}"))
    return prefill + decode


def workload(name: str, encode: Encode, context_length: int) -> Work:
    """The shipped workload `name`, its prompts turned into token ids by `encode`.

    Raises InvalidSettingError for a name that is not known or a workload that does not fit the context, and
    what `encode` raises: PromptError for a model without a chat template.
    """
    loaded = load_workload(name)
    queries = [Query(tuple(encode(prompt)), loaded.new_tokens, prompt) for prompt in loaded.prompts]
    groups = tuple(
        tuple(queries[begin : begin + loaded.concurrent])
        for begin in range(0, len(queries), loaded.concurrent)
    )
    work = _work(name, "workload", groups, loaded.description)
    if work.context_length > context_length:
        raise InvalidSettingError(
            f"the workload {name} needs a context of {work.context_length:,} tokens, {loaded.new_tokens:,} "
            f"of them for the answer, but there are {context_length:,}. Leave it out, or choose a model or a "
            "context length that holds it."
        )
    return work


@dataclass(frozen=True)
class _RandomPrompts:
    ids: Sequence[int]
    seed: int
    count: int

    def draw(self, name: str, size: int, new_tokens: int) -> tuple[Group, ...]:
        """`count` prompts of `size` ids for the case `name`, each a group of its own."""
        numbers = random.Random(f"{self.seed} {name}")  # strings are hashed the same everywhere
        prompts: dict[int, Query] = {}  # by first id
        while len(prompts) < self.count:
            # Of all methods, only random() promises the same numbers in each release of Python.
            ids = tuple(self.ids[int(numbers.random() * len(self.ids))] for _ in range(size))
            prompts.setdefault(ids[0], Query(ids, new_tokens))
        return tuple((query,) for query in prompts.values())


def _work(
    name: str, kind: Literal["prefill", "decode", "workload"], groups: tuple[Group, ...], description: str
) -> Work:
    queries = [query for group in groups for query in group]
    canonical = [[[list(query.prompt_ids), query.new_tokens] for query in group] for group in groups]
    case = Case(
        name=name,
        kind=kind,
        prompt_tokens=fmean(len(query.prompt_ids) for query in queries),
        new_tokens=queries[0].new_tokens,
        concurrent=len(groups[0]),
        sha256=hashlib.sha256(json.dumps(canonical, separators=(",", ":")).encode()).hexdigest(),
        description=description,
    )
    return Work(case, groups)


def _check(name: str, sizes: Sequence[int], *, least: int) -> None:
    for index, size in enumerate(sizes):
        if size < least:
            raise InvalidSettingError(f"{name} is {size}; at least {least} is expected.")
        if size in sizes[:index]:
            raise InvalidSettingError(f"{name} holds {size} twice. Name each size once.")


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"
