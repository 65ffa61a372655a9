"""What both checkpoint formats need to know about a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer

from pocketlm.errors import CheckpointError, PocketlmError

# Tokens with which chat templates close a turn, of all families.
_END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|eom_id|>", "<|eot|>",
    "<|end_of_text|>", "<|endoftext|>", "</s>", "<|EOT|>", "<EOT>", "<|return|>", "<end_of_utterance>",
)  # fmt: skip


@contextmanager
def damage_reported(what: str) -> Iterator[None]:
    """Turns whatever the `tokenizers` library raises about bad input into CheckpointError."""
    try:
        yield
    except PocketlmError:
        raise
    except BaseException as error:
        # The library raises plain Exceptions, and Rust's failed assertions arrive as a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
        raise CheckpointError(f"{what} is damaged: {reason}. Fetch the model again.") from None


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`'s text. Raises CheckpointError if it is none."""
    with damage_reported(where):
        return Tokenizer.from_str(text)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Content → id of the special tokens."""
    return {
        token.content: token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }


def end_of_turn_ids(template: str | None, special: dict[str, int]) -> list[int]:
    """The special tokens with which `template` closes a turn: an answer ends there."""
    return [special[name] for name in _END_OF_TURN if template and name in template and name in special]
