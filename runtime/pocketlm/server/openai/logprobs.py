"""Log-probabilities of tokens, in the two forms that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocketlm.generate import Piece
from pocketlm.tokenizer import Tokenizer

LEAST = -9999.0
"""What the API says of a token that cannot come: JSON has no infinity."""


def chat_logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    """`logprobs` of a choice of chat completions."""
    return {"content": [token_logprob(tokenizer, piece) for piece in pieces], "refusal": None}


def token_logprob(tokenizer: Tokenizer, piece: Piece) -> dict[str, Any]:
    """A token with its log-probability and those of the most likely ones."""
    top = [_token(tokenizer, token_id, logprob) for token_id, logprob in piece.top_logprobs]
    return {**_token(tokenizer, piece.token_id, piece.logprob), "top_logprobs": top}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    content = tokenizer.token_bytes(token_id)
    return {"token": content.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(content)}


def completion_logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece], offset: int = 0) -> dict[str, Any]:
    """`logprobs` of a choice of completions; `offset` is where in its text the pieces begin, in characters.

    The chosen token is among the most likely ones even where it is not one of them.
    """
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.text)
    return {
        "tokens": [_name(tokenizer, piece.token_id) for piece in pieces],
        "token_logprobs": [finite(piece.logprob) for piece in pieces],
        "top_logprobs": [
            {
                _name(tokenizer, token_id): finite(logprob)
                for token_id, logprob in (*piece.top_logprobs, (piece.token_id, piece.logprob))
            }
            for piece in pieces
        ],
        "text_offset": offsets,
    }


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text, or its bytes where they are none: they are keys, which have to differ."""
    content = tokenizer.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
