"""Tokenizer metadata of a GGUF file → the text of a Hugging Face `tokenizer.json`.

Two kinds: "gpt2" is byte-level BPE with merges and a named pre-tokenizer; "llama" is SentencePiece BPE,
which stores a score for each piece instead of merges. Both encode as the model's own tokenizer does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import TokenType
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm.manifest import Tokens
from pocketlm_exporters.checkpoint.gguf_file import Metadata
from pocketlm_exporters.checkpoint.pre_tokenizers import find_pre_tokenizer
from pocketlm_exporters.checkpoint.vocabulary import damage_reported, end_of_turn_ids, special_ids

_KEY = "tokenizer.ggml."
_SPACE = "▁"  # SentencePiece's visible space
# Deriving merges takes time by the square of a piece's length; real pieces have at most some 100 characters.
_MAX_PIECE_LENGTH = 1_000
_SPECIAL_TYPES = (TokenType.CONTROL, TokenType.UNKNOWN)
Merge = tuple[str, str]


@dataclass(frozen=True)
class GgufTokenizer:
    json: str
    chat_template: str | None
    tokens: Tokens
    size: int  # tokens, with unused ones


def read_tokenizer(metadata: Metadata, where: str) -> GgufTokenizer:
    """The tokenizer of the GGUF file `where` whose metadata these are.

    Raises UnsupportedModelError for a kind of tokenizer or a pre-tokenizer that pocketlm does not know,
    CheckpointError for damaged metadata.
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = metadata.require(f"{_KEY}model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UnsupportedModelError(
            f"{where} has a tokenizer of the kind {kind!r:.99}; pocketlm reads {' and '.join(builders)}. "
            "Export the model from its safetensors folder instead, which carries its own tokenizer.json."
        )
    with damage_reported(f"The tokenizer of {where}"):
        tokenizer, add_bos = builders[kind](vocabulary)
        tokenizer.add_special_tokens(vocabulary.added(_SPECIAL_TYPES, special=True))
        tokenizer.add_tokens(vocabulary.added((TokenType.USER_DEFINED,), special=False))
    bos = vocabulary.token_id("bos")
    said = metadata.get(f"{_KEY}add_bos_token", bool)
    add_bos = bos is not None and (add_bos if said is None else said)
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            pair=["bos", "$A", "bos", "$B"],
            special_tokens=[{"id": "bos", "ids": [bos], "tokens": [vocabulary.pieces[bos]]}],
        )
    template = metadata.get("tokenizer.chat_template", str) or None
    eos = [vocabulary.token_id(role) for role in ("eos", "eot", "eom")]
    eos += end_of_turn_ids(template, special_ids(tokenizer))
    tokens = Tokens(bos=bos, eos=tuple(dict.fromkeys(i for i in eos if i is not None)), add_bos=add_bos)
    return GgufTokenizer(tokenizer.to_str(), template, tokens, len(vocabulary.pieces))


class _Vocabulary:
    """`pieces` by id, and what else the metadata says about them."""

    def __init__(self, metadata: Metadata, where: str) -> None:
        self.metadata = metadata
        self.where = where
        pieces = metadata.texts(f"{_KEY}tokens")
        if not pieces:
            raise CheckpointError(f"{where} has no {_KEY}tokens. It holds no tokenizer: take another file.")
        self.pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(pieces)]  # as llama.cpp does
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        if len(self.ids) != len(self.pieces):
            twice = next(piece for i, piece in enumerate(self.pieces) if self.ids[piece] != i)
            raise CheckpointError(f"{where} has the token {twice!r:.99} twice. Fetch it again.")
        types = self.numbers("token_type")
        self.types = np.full(len(self.pieces), TokenType.NORMAL) if types is None else types

    def numbers(self, key: str) -> NDArray[Any] | None:
        """One number a token, or None if the file has none."""
        values = self.metadata.numbers(_KEY + key)
        if values is not None and len(values) != len(self.pieces):
            raise CheckpointError(
                f"{self.where} has {len(values):,} {_KEY}{key} for {len(self.pieces):,} tokens, "
                "expected as many. The file is damaged: fetch it again."
            )
        return values

    def of_type(self, *types: TokenType) -> list[int]:
        ids: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return ids

    def added(self, types: tuple[TokenType, ...], *, special: bool) -> list[AddedToken]:
        return [AddedToken(self.pieces[i], normalized=False, special=special) for i in self.of_type(*types)]

    def token_id(self, role: str) -> int | None:
        token_id = self.metadata.get(f"{_KEY}{role}_token_id", int)
        if token_id is not None and not 0 <= token_id < len(self.pieces):
            raise CheckpointError(
                f"{self.where}: {_KEY}{role}_token_id is {token_id}, but there are {len(self.pieces):,} "
                "tokens. The file is damaged: fetch it again."
            )
        return token_id


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.metadata.get(f"{_KEY}pre", str) or "default"
    pre = find_pre_tokenizer(name, vocabulary.where)
    merges = vocabulary.metadata.texts(f"{_KEY}merges")
    if merges is None:
        raise CheckpointError(f"{vocabulary.where} has no {_KEY}merges. Convert or fetch it again.")
    pairs = [_pair(merge, vocabulary) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, pairs, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _pair(merge: str, vocabulary: _Vocabulary) -> Merge:
    space = merge.find(" ", 1)  # a piece may begin with a space
    left, right = merge[:space], merge[space + 1 :]
    if space < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
        raise CheckpointError(
            f"{vocabulary.where}: the merge {merge!r:.99} does not join two tokens to a third. "
            "The file is damaged: fetch it again."
        )
    return left, right


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """As transformers' LlamaConverter builds it for a legacy tokenizer: so does llama.cpp encode."""
    scores = vocabulary.numbers("scores")
    if scores is None or not np.isfinite(scores).all():
        raise CheckpointError(
            f"{vocabulary.where} has no {_KEY}scores, or some that are no numbers. Fetch it again."
        )
    unknown = vocabulary.token_id("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.ids,
            _merges(vocabulary, scores),
            unk_token=None if unknown is None else vocabulary.pieces[unknown],
            fuse_unk=True,
            byte_fallback=bool(vocabulary.of_type(TokenType.BYTE)),
        )
    )
    prefix = vocabulary.metadata.get(f"{_KEY}add_space_prefix", bool) is not False
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), replace] if prefix else [replace]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _merges(vocabulary: _Vocabulary, scores: NDArray[Any]) -> list[Merge]:
    """All ways to join two pieces to a third, the best third first (transformers' `generate_merges`)."""
    merges: list[tuple[float, int, int, Merge]] = []
    for i in vocabulary.of_type(TokenType.NORMAL):
        piece, score = vocabulary.pieces[i], float(scores[i])
        if len(piece) > _MAX_PIECE_LENGTH:
            raise CheckpointError(
                f"{vocabulary.where} has a token of {len(piece):,} characters, expected at most "
                f"{_MAX_PIECE_LENGTH:,}. The file is damaged: fetch it again."
            )
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary.ids and right in vocabulary.ids:
                merges.append((score, cut, len(piece) - cut, (left, right)))
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge for *_, merge in merges]
