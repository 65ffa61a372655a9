"""One model's tokens held against a grammar: which may come next, and which must."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pocketlm.constraint.grammar import Grammar, limits, load_llguidance, on_deep_stack
from pocketlm.errors import InvalidSettingError, PocketlmError
from pocketlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 16  # grammars that one factory keeps


class ConstraintError(PocketlmError):
    """A grammar grew too complex while an answer was on its way, or a token came that it forbids."""


class ConstraintFactory:
    """A model's tokens, prepared for grammars. Thread-safe; one per model, as preparing takes a second or so.

    Nothing is done until the first `constraint`.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: Sequence[int]) -> None:
        """`vocabulary` is the width of the logits, `eos` the ids that end an answer.

        Raises InvalidSettingError if no id of `eos` has a logit: no answer could end.
        """
        known = [token_id for token_id in eos if 0 <= token_id < vocabulary]
        if not known:
            raise InvalidSettingError(
                f"the ids {list(eos)} end an answer, expected one within the {vocabulary:,} logits. "
                "Structured output needs a model that can end its answer."
            )
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos = known
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def constraint(self, grammar: Grammar) -> Constraint:
        """A new answer's constraint. A grammar that came lately is not compiled again.

        Raises InvalidSettingError if the grammar does not fit the model (an unknown special token), and
        MissingExtraError without llguidance.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compile(grammar)
                self._compiled[grammar] = matcher
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(grammar)
            return Constraint(matcher.deep_copy(), self._vocabulary)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        llguidance = load_llguidance()
        if self._prepared is None:
            tokens = _Tokens(self._tokenizer, self._vocabulary, self._eos)
            self._prepared = llguidance.LLTokenizer(
                tokens, eos_token=self._eos, slices=llguidance.LLTokenizer.json_slices()
            )
        prepared = self._prepared
        matcher: LLMatcher = on_deep_stack(
            lambda: llguidance.LLMatcher(prepared, grammar.source, log_level=0, limits=limits())
        )
        if matcher.is_error():
            raise InvalidSettingError(
                f"the {grammar.kind} does not work with this model: {matcher.get_error()}"
            )
        return matcher


class Constraint:
    """Where one answer stands in its grammar. Not thread-safe; `fork` for each further answer.

    Raises ConstraintError, from every method and property, once the grammar is too complex to go on.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits = np.zeros(-(-vocabulary // 32), dtype=np.uint32)

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Sets the logits (vocabulary,) of all tokens that may not come next to minus infinity, in place.

        A token that ends the answer may come only where the answer is complete.
        """
        if logits.shape != (self._vocabulary,):
            raise InvalidSettingError(
                f"the logits have the shape {logits.shape}, the constraint was made for "
                f"({self._vocabulary},). Pass one row."
            )
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        forbidden = np.unpackbits(
            np.bitwise_not(self._bits).view(np.uint8), count=self._vocabulary, bitorder="little"
        )
        np.putmask(logits, forbidden.view(np.bool_), -np.inf)

    def accept(self, token_id: int) -> None:
        """Goes on by a token that `mask` allows. Raises ConstraintError for any other."""
        self._matcher.consume_token(token_id)
        self._check()

    def forced(self) -> list[int]:
        """Tokens that are the only way on from here; mostly none."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        accepting: bool = self._matcher.is_accepting()
        self._check()
        return accepting

    @property
    def must_stop(self) -> bool:
        """Whether nothing can follow, but the end."""
        stopped: bool = self._matcher.is_stopped()
        self._check()
        return stopped

    def fork(self) -> Constraint:
        """Another constraint that stands where this one does."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(
                f"the answer cannot go on under its grammar: {self._matcher.get_error().strip()} "
                "Simplify the grammar."
            )


class _Tokens:
    """A tokenizer as llguidance takes it. Reading the same bytes as the decoder, both always agree."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos[0]
        self.bos_token_id = None
        # An id without a token, such as a padded one, has no bytes and is never allowed.
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocabulary)]
        # What ends an answer must never be part of one, not even where the text of the token would be.
        self._special = {*tokenizer.special_ids, *eos}
        self.special_token_ids = [token_id for token_id in sorted(self._special) if token_id < vocabulary]
        self._ids = {text: token_id for token_id, text in enumerate(self.tokens) if text}
        for token_id in self.special_token_ids:
            self._ids.pop(self.tokens[token_id], None)
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that a grammar forces, in which nothing is a special token."""
        ids = self._tokenizer.encode(text, add_bos=False)
        if self._spells(ids, text):
            return ids
        # A tokenizer that puts a space in front of a text does not if the text goes on behind a line's end.
        before = self._tokenizer.encode("\n", add_bos=False)
        ids = self._tokenizer.encode("\n" + text, add_bos=False)
        if ids[: len(before)] == before and self._spells(ids[len(before) :], text):
            return ids[len(before) :]
        return self._greedy(text.encode())

    def _spells(self, ids: Sequence[int], text: str) -> bool:
        plain = all(token_id < len(self.tokens) and token_id not in self._special for token_id in ids)
        return plain and b"".join(self.tokens[token_id] for token_id in ids) == text.encode()

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token first; as far as there are tokens."""
        ids = []
        begin = 0
        while begin < len(data):
            for end in range(min(len(data), begin + self._longest), begin, -1):
                if (token_id := self._ids.get(data[begin:end])) is not None:
                    ids.append(token_id)
                    begin = end
                    break
            else:
                break
        return ids
