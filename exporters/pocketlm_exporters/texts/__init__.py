"""The texts that exports are calibrated and verified on, and the prompts that tables of n-grams come from.

README.md beside them tells where they are from.
"""

from __future__ import annotations

from importlib import resources

from pocketlm.tokenizer import Tokenizer

CALIBRATION = "calibration.txt"
VERIFICATION = "verification.txt"
PROMPTS = "prompts.txt"  # one a line


def windows(name: str, tokenizer: Tokenizer, size: int) -> list[list[int]]:
    """The text `name` as `split` cuts it."""
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    return split(text, tokenizer, size)


def split(text: str, tokenizer: Tokenizer, size: int) -> list[list[int]]:
    """`text` as sequences of at most `size` tokens, each with what the model expects at a start."""
    start = tokenizer.encode("")
    ids = tokenizer.encode(text, add_bos=False)
    room = size - len(start)
    return [start + ids[begin : begin + room] for begin in range(0, len(ids), room)]
