"""How large the tokens of a Lark grammar are once those that they are made of are written out.

Rules refer to each other, but tokens (their names are in capitals) are put into one another: with eight
others in each, five levels are a regex of 37,000 parts. On that llguidance works for more than a
minute, whatever its limits.
"""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter

_NAME = re.compile(r"_?[A-Z][A-Z0-9_]*")
_NO_NAMES = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/[a-z]*|#[^\n]*')
_HEAD = re.compile(r"^[ \t]*[?!]?([A-Za-z_][A-Za-z0-9_]*)[^\n:]*:", re.MULTILINE)


def parts_of_tokens(text: str) -> int:
    """How many names stand in all tokens of the grammar `text`, when written out; 0 where they are made of
    each other in a circle."""
    # Behind a literal stays a space: what stands before and after it are two names.
    heads = list(_HEAD.finditer(text := _NO_NAMES.sub(" ", text)))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    made_of = {
        head[1]: _NAME.findall(text, head.end(), end)
        for head, end in zip(heads, ends, strict=False)
        if _NAME.fullmatch(head[1])
    }
    sizes: dict[str, int] = {}
    try:
        for name in TopologicalSorter(made_of).static_order():
            sizes[name] = 1 + sum(sizes[other] for other in made_of.get(name, ()))
    except CycleError:
        return 0
    return sum(sizes[name] for name in made_of)
