"""From logits to a token.

What `Sampler.sample` does, always in this order:

1. `logit_bias` is added to the logits it names.
2. `repetition_penalty`: logits of tokens in the prompt or the answer are divided by it where positive and
   multiplied where not (CTRL, Keskar et al., 2019, arXiv:1909.05858; the sign as Hugging Face repairs it).
3. `presence_penalty` and `frequency_penalty`: logits of tokens in the answer fall by the former once and by
   the latter per occurrence (as the OpenAI API defines them).
4. `min_tokens`: until so many tokens were chosen, logits of `eos` are −inf, unless all others are too: an
   answer that a constraint has completed can only end.
5. `temperature` divides the logits. At 0 the largest logit wins and nothing below applies.
6. `top_k` keeps the k most likely tokens.
7. `top_p` keeps the fewest most likely tokens that hold at least this share of what is left
   (Holtzman et al., 2020, arXiv:1904.09751).
8. `min_p` keeps tokens that are at least this many times as likely as the most likely one
   (Nguyen et al., 2024, arXiv:2407.01082).
9. One uniform number picks from what is left, by the cumulated probabilities in the order of token ids.

Equally likely tokens rank by id, the lowest first. Steps 5 to 9 are in `pocketlm.distribution`. A sampled
token takes exactly one uniform number and a greedy one none, so the n-th token has the n-th number however
many rows of logits a pass computes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketlm.distribution import TINY, Floats, Indices, choose, keep_top_k, softmax_weights
from pocketlm.errors import InvalidSettingError, PocketlmError, PromptError

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy; the module's docstring says what each setting does.

    Raises InvalidSettingError for a setting outside its range.
    """

    temperature: float = 0.0  # ≥ 0; 0 is greedy
    top_k: int = 0  # tokens; 0 is off
    top_p: float = 1.0  # 0 … 1; 1 is off
    min_p: float = 0.0  # 0 … 1; 0 is off
    repetition_penalty: float = 1.0  # > 0; 1 is off
    presence_penalty: float = 0.0  # any sign; 0 is off
    frequency_penalty: float = 0.0  # any sign; 0 is off
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id → added to its logit
    seed: int | None = None  # ≥ 0; None draws one from the operating system

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, at_least=0.0)
        _check_integer("top_k", self.top_k)
        _check_real("top_p", self.top_p, at_least=0.0, at_most=1.0)
        _check_real("min_p", self.min_p, at_least=0.0, at_most=1.0)
        _check_real("repetition_penalty", self.repetition_penalty, at_least=TINY)
        _check_real("presence_penalty", self.presence_penalty)
        _check_real("frequency_penalty", self.frequency_penalty)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidSettingError(
                f"logit_bias is {self.logit_bias!r}, expected a mapping from token ids to numbers."
            )
        for token, bias in self.logit_bias.items():
            _check_integer("a token id of logit_bias", token)
            _check_real(f"logit_bias of token {token}", bias)
        if self.seed is not None:
            _check_integer("seed", self.seed)
        # A copy, so that a frozen setting stays what it was checked to be.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def penalizes(self) -> bool:
        """Whether tokens that have come before are treated differently."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _check_real(name: str, value: object, *, at_least: float = -math.inf, at_most: float = math.inf) -> None:
    number = _as_float(value)
    if math.isfinite(number) and at_least <= number <= at_most:
        return
    if at_most < math.inf:
        expected = f"a number from {at_least:g} to {at_most:g}"
    elif at_least > 0:
        expected = "a finite number above 0"
    elif at_least == 0:
        expected = "a finite number, 0 or above"
    else:
        expected = "a finite number"
    raise InvalidSettingError(f"{name} is {value!r}, expected {expected}.")


def _as_float(value: object) -> float:
    """NaN for what is no number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # An integer beyond the largest float.
        return math.inf


def _check_integer(name: str, value: object, *, at_most: float = math.inf) -> None:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) <= at_most:
        return
    expected = "an integer, 0 or above" if at_most == math.inf else f"an integer from 0 to {at_most}"
    raise InvalidSettingError(f"{name} is {value!r}, expected {expected}.")


class Sampled(NamedTuple):
    """A chosen token. Log-probabilities are in nats, under the model's own distribution."""

    token_id: int
    logprob: float | None  # None unless asked for
    top: tuple[tuple[int, float], ...]  # the most likely ids and their log-probabilities, falling


class Sampler:
    """Chooses the tokens of one answer. Equal settings, prompt, seed and logits give equal tokens."""

    def __init__(
        self,
        sampling: Sampling,
        vocabulary: int,
        prompt_ids: Sequence[int],
        *,
        top_logprobs: int | None = None,
        min_tokens: int = 0,
        eos: Collection[int] = (),
    ) -> None:
        """`vocabulary` is the length of the logits; ids of `eos` cannot be the first `min_tokens` tokens.

        `top_logprobs`: 0 for the log-probability of each chosen token, up to 20 for so many of the most
        likely ones as well; they take an exponential of every logit, so None leaves them out.

        Raises InvalidSettingError for a setting out of range or a token outside the vocabulary, and
        PromptError for such a token in `prompt_ids` if the settings look at the prompt.
        """
        if top_logprobs is not None:
            _check_integer("top_logprobs", top_logprobs, at_most=MAX_TOP_LOGPROBS)
        _check_integer("min_tokens", min_tokens)
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._top_logprobs = top_logprobs
        self._min_tokens = min_tokens
        self._count = 0
        self._eos = np.array([_inside("eos", token, vocabulary) for token in eos], dtype=np.intp)
        bias = sampling.logit_bias
        self._bias_ids = np.array([_inside("logit_bias", token, vocabulary) for token in bias], dtype=np.intp)
        self._biases = np.array(list(bias.values()), dtype=np.float64)
        self._history = _History(vocabulary) if sampling.penalizes else None
        if self._history and sampling.repetition_penalty != 1.0:
            self._history.add_prompt(prompt_ids)
        self._bits = _random_bits(sampling.seed)
        self._buffer = np.empty(vocabulary, dtype=np.float32)

    def fork(self, index: int) -> Sampler:
        """An independent sampler for answer `index` (from 0) of several: the same history, other numbers.

        Its random numbers begin anew, those of the seed plus `index`; without a seed the operating system
        draws. Raises InvalidSettingError if `index` is no integer of 0 or above.
        """
        _check_integer("index", index)
        seed = self._sampling.seed
        twin = copy(self)
        twin._history = self._history and self._history.copy()
        twin._bits = _random_bits(None if seed is None else int(seed) + int(index))
        twin._buffer = np.empty_like(self._buffer)
        return twin

    def sample(self, logits: Floats) -> Sampled:
        """The next token.

        `logits`: float32 (vocabulary,), −inf for a token that must not come; left as they are. The
        log-probabilities are the log-softmax of exactly these, whatever the settings.

        Raises InvalidSettingError for another shape, and PocketlmError if a logit is NaN or +inf or if all
        are −inf.
        """
        if logits.shape != (self._vocabulary,):
            raise InvalidSettingError(
                f"the logits have the shape {logits.shape}, expected ({self._vocabulary},). Pass one row."
            )
        adjusted = self._adjust(logits)
        token = _argmax(adjusted)
        sampling = self._sampling
        if sampling.temperature > 0:
            token = choose(
                adjusted,
                self._uniform(),
                peak=float(adjusted[token]),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
        self._count += 1
        if self._history:
            self._history.add(token)
        if self._top_logprobs is None:
            return Sampled(token, None, ())
        return self._with_logprobs(logits, token, self._top_logprobs)

    def _adjust(self, logits: Floats) -> Floats:
        """Steps 1 to 4. `logits` itself if there is nothing to change."""
        ends = self._eos.size > 0 and self._count < self._min_tokens
        if not self._bias_ids.size and not self._history and not ends:
            return logits
        adjusted, sampling = self._buffer, self._sampling
        np.positive(logits, out=adjusted)
        with np.errstate(over="ignore"):  # What comes of it is refused when it is chosen.
            adjusted[self._bias_ids] += self._biases
        if self._history:
            ids, counts = self._history.tokens()
            values = penalize_repetition(adjusted[ids], sampling.repetition_penalty)
            adjusted[ids] = penalize_presence(
                values, counts, sampling.presence_penalty, sampling.frequency_penalty
            )
        if ends:
            values = adjusted[self._eos]
            adjusted[self._eos] = -np.inf
            if adjusted.max() == -np.inf:
                adjusted[self._eos] = values
        return adjusted

    def _with_logprobs(self, logits: Floats, token: int, count: int) -> Sampled:
        """`logits` are the model's own; the buffer's content is lost."""
        with np.errstate(over="ignore"):  # Differences beyond float32 are −inf, hence weights of 0.
            total = float(logits.max()) + math.log(softmax_weights(logits, out=self._buffer).sum())
        logprob = float(logits[token]) - total
        if count == 0:
            return Sampled(token, logprob, ())
        likely = keep_top_k(logits, min(count, logits.size))
        values = logits[likely]
        falling = np.argsort(-values, kind="stable")  # ids ascend, so of equals the lowest stays first
        top = zip(likely[falling].tolist(), values[falling].tolist(), strict=True)
        return Sampled(token, logprob, tuple((i, value - total) for i, value in top if value > -math.inf))

    def _uniform(self) -> float:
        """The next number of [0, 1), with 53 random bits."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53


def _random_bits(seed: int | None) -> np.random.PCG64:
    # Raw bits: unlike what a Generator makes of them, numpy promises that they never change (NEP 19).
    return np.random.PCG64(None if seed is None else int(seed))


def _inside(name: str, token: int, vocabulary: int) -> int:
    _check_integer(f"a token id of {name}", token)
    if token >= vocabulary:
        raise InvalidSettingError(
            f"{name} names token {token}, but the vocabulary ends at {vocabulary - 1}. Leave it out."
        )
    return int(token)


class _History:
    """The distinct tokens so far, and how often each has come in the answer."""

    def __init__(self, vocabulary: int) -> None:
        self._ids = np.empty(vocabulary, dtype=np.intp)
        self._counts = np.zeros(vocabulary, dtype=np.int64)
        self._places: dict[int, int] = {}

    def add_prompt(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self._ids.size:
                raise PromptError(
                    f"the prompt has the token id {token}, but the vocabulary ends at {self._ids.size - 1}. "
                    "Encode it with the model's own tokenizer."
                )
            self._place(int(token))

    def add(self, token: int) -> None:
        self._counts[self._place(token)] += 1

    def copy(self) -> _History:
        twin, size = _History(self._ids.size), len(self._places)
        twin._ids[:size], twin._counts[:size] = self._ids[:size], self._counts[:size]
        twin._places = dict(self._places)
        return twin

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self._places))
        self._ids[place] = token
        return place

    def tokens(self) -> tuple[Indices, NDArray[np.int64]]:
        """Ids and their counts; 0 for a token of the prompt that has not come in the answer."""
        size = len(self._places)
        return self._ids[:size], self._counts[:size]


def _argmax(logits: Floats) -> int:
    """The first of the largest logits. Raises PocketlmError if that is not a finite number."""
    best = int(logits.argmax())  # The first NaN if there is any.
    value = float(logits[best])
    if math.isfinite(value):
        return best
    if value == -math.inf:
        raise PocketlmError("every token is masked (all logits are −inf), so none can come next.")
    raise PocketlmError(
        f"the logit of token {best} is {value}, expected a finite number. If logit_bias and the penalties "
        "are of ordinary size, the model's weights are damaged: export or pull the model again."
    )


def penalize_repetition(logits: Floats, penalty: float) -> Floats:
    """Step 2, for the logits of tokens that have come before."""
    exact = logits.astype(np.float64)
    penalized: Floats = np.where(exact > 0, exact / penalty, exact * penalty).astype(np.float32)
    return penalized


def penalize_presence(logits: Floats, counts: NDArray[np.int64], presence: float, frequency: float) -> Floats:
    """Step 3. `counts` says how often each token has come in the answer."""
    exact = logits.astype(np.float64)
    penalized: Floats = (exact - presence * (counts > 0) - frequency * counts).astype(np.float32)
    return penalized
