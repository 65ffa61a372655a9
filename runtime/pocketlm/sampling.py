"""From logits to a token.

What `Sampler.sample` does, always in this order:

1. `logit_bias` is added to the logits it names.
2. `repetition_penalty`: logits of tokens in the prompt or the answer are divided by it where positive and
   multiplied where not (CTRL, Keskar et al., 2019, arXiv:1909.05858; the sign as Hugging Face repairs it).
3. `presence_penalty` and `frequency_penalty`: logits of tokens in the answer fall by the former once and by
   the latter per occurrence (as the OpenAI API defines them).
4. `temperature` divides the logits. At 0 the largest logit wins and nothing below applies.
5. `top_k` keeps the k most likely tokens.
6. `top_p` keeps the fewest most likely tokens that hold at least this share of what is left
   (Holtzman et al., 2020, arXiv:1904.09751).
7. `min_p` keeps tokens that are at least this many times as likely as the most likely one
   (Nguyen et al., 2024, arXiv:2407.01082).
8. One uniform number picks from what is left, by the cumulated probabilities in the order of token ids.

Equally likely tokens rank by id, the lowest first. Each step is a pure function below; steps 5 to 7 return
ascending indices of what they keep. "Weights" are probabilities before they are divided by their sum.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import InvalidSettingError, PocketlmError, PromptError

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

_TINY = float(np.finfo(np.float32).tiny)
_BLOCK = 64


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
        _check_real("repetition_penalty", self.repetition_penalty, at_least=_TINY)
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


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise InvalidSettingError(f"{name} is {value!r}, expected an integer, 0 or above.")


class Sampler:
    """Chooses the tokens of one answer. Equal settings, prompt, seed and logits give equal tokens."""

    def __init__(self, sampling: Sampling, vocabulary: int, prompt_ids: Sequence[int]) -> None:
        """`vocabulary` is the length of the logits.

        Raises InvalidSettingError for a bias on a token outside the vocabulary, and PromptError for such a
        token in `prompt_ids` if the settings look at the prompt.
        """
        self._sampling = sampling
        self._vocabulary = vocabulary
        last = max(sampling.logit_bias, default=0)
        if last >= vocabulary:
            raise InvalidSettingError(
                f"logit_bias names token {last}, but the vocabulary ends at {vocabulary - 1}. Leave it out."
            )
        self._bias_ids = np.array(list(sampling.logit_bias), dtype=np.intp)
        self._biases = np.array(list(sampling.logit_bias.values()), dtype=np.float64)
        self._history = _History(vocabulary) if sampling.penalizes else None
        if self._history and sampling.repetition_penalty != 1.0:
            self._history.add_prompt(prompt_ids)
        # Raw bits: unlike what a Generator makes of them, numpy promises that they never change (NEP 19).
        self._bits = np.random.PCG64(None if sampling.seed is None else int(sampling.seed))
        self._weights = np.empty(vocabulary, dtype=np.float32)
        self._adjusted = np.empty(vocabulary, dtype=np.float32)

    def sample(self, logits: Floats) -> tuple[int, float]:
        """The next token and its log-probability in nats under the model's own distribution.

        `logits`: float32 (vocabulary,), −inf for a token that must not come; left as they are. The
        log-probability is the log-softmax of exactly these, whatever the settings.

        Raises InvalidSettingError for another shape, and PocketlmError if a logit is NaN or +inf or if all
        are −inf.
        """
        if logits.shape != (self._vocabulary,):
            raise InvalidSettingError(
                f"the logits have the shape {logits.shape}, expected ({self._vocabulary},). Pass one row."
            )
        peak = float(logits[_argmax(logits)])
        with np.errstate(over="ignore"):  # Differences beyond float32 are −inf, hence weights of 0.
            weights = softmax_weights(logits, out=self._weights)
            log_total = math.log(weights.sum())
            token = self._choose(logits, weights)
        if self._history:
            self._history.add(token)
        return token, float(logits[token]) - (peak + log_total)

    def _choose(self, logits: Floats, weights: Floats) -> int:
        """`weights` are those of the plain `logits` at temperature 1."""
        sampling = self._sampling
        adjusted = self._adjust(logits)
        best = _argmax(adjusted)
        if sampling.temperature == 0:
            return best
        kept: Indices | None = None
        if 0 < sampling.top_k < self._vocabulary:
            # Before the temperature, which changes no order: only k logits need an exponential.
            kept = top_k(adjusted, sampling.top_k)
            weights = softmax_weights(adjusted[kept], sampling.temperature)
        elif adjusted is not logits or sampling.temperature != 1:
            weights = softmax_weights(adjusted, sampling.temperature, out=self._weights)
        if sampling.top_p < 1:
            chosen = top_p(weights, sampling.top_p)
            kept, weights = (chosen if kept is None else kept[chosen]), weights[chosen]
        if sampling.min_p > 0:
            chosen = min_p(weights, sampling.min_p)
            kept, weights = (chosen if kept is None else kept[chosen]), weights[chosen]
        index = draw(weights, self._uniform())
        return index if kept is None else int(kept[index])

    def _adjust(self, logits: Floats) -> Floats:
        """Bias and penalties. `logits` itself if there are none."""
        if not self._bias_ids.size and not self._history:
            return logits
        adjusted, sampling = self._adjusted, self._sampling
        np.copyto(adjusted, logits)
        adjusted[self._bias_ids] += self._biases
        if self._history:
            ids, counts = self._history.tokens()
            values = penalize_repetition(adjusted[ids], sampling.repetition_penalty)
            adjusted[ids] = penalize_presence(
                values, counts, sampling.presence_penalty, sampling.frequency_penalty
            )
        return adjusted

    def _uniform(self) -> float:
        """The next number of [0, 1), with 53 random bits."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53


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


def softmax_weights(logits: Floats, temperature: float = 1.0, out: Floats | None = None) -> Floats:
    """Step 4 and the exponential: exp((logits − max) / temperature), so the largest weight is 1."""
    weights: Floats = np.subtract(logits, logits.max(), out=out)
    if temperature != 1:
        np.divide(weights, np.float32(max(temperature, _TINY)), out=weights)
    np.exp(weights, out=weights)
    return weights


def top_k(logits: Floats, k: int) -> Indices:
    """Step 5: the `k` largest, 0 < k ≤ number of logits."""
    # Saves partitioning all of them: the k-th largest of the maxima of disjoint groups bounds the k-th
    # largest logit from below, and few logits reach it.
    groups = logits[: logits.size // _BLOCK * _BLOCK].reshape(_BLOCK, -1).max(axis=0)
    near = np.flatnonzero(logits >= _kth_largest(groups, k)) if k <= groups.size else np.arange(logits.size)
    values = logits[near]
    return near[_largest(values, _kth_largest(values, k), k)]


def top_p(weights: Floats, p: float) -> Indices:
    """Step 6: the fewest of the largest weights whose sum reaches `p` of the whole, but at least one."""
    total = float(weights.sum(dtype=np.float64))
    # Saves sorting the long tail. Mostly the few weights above the first threshold are enough. Those above
    # the second always are, as all others together hold less than 1 − p, except that rounding may make them
    # miss by a hair.
    for threshold in ((1 - p) * total / 32, (1 - p) * total / weights.size, 0.0):
        near = np.flatnonzero(weights >= threshold)
        values = weights[near]
        if near.size and values.sum(dtype=np.float64) >= p * total:
            break
    descending = np.sort(values)[::-1]
    reached = int(np.searchsorted(descending.cumsum(dtype=np.float64), p * total)) + 1
    count = min(reached, values.size)
    return near[_largest(values, descending[count - 1], count)]


def min_p(weights: Floats, p: float) -> Indices:
    """Step 7: weights of at least `p` times the largest."""
    return np.flatnonzero(weights >= np.float32(p) * weights.max())


def draw(weights: Floats, uniform: float) -> int:
    """Step 8: the index where the cumulated weights pass `uniform` (of [0, 1)) of their sum."""
    # In two levels, as cumulating a whole vocabulary would take longer than all the rest.
    size = max(_BLOCK, math.isqrt(weights.size))
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, size), dtype=np.float64)
    target = uniform * float(blocks.sum())
    block, before = _passed(blocks, target)
    inside = weights[block * size : (block + 1) * size]
    return block * size + _passed(inside, target - before)[0]


def _passed(weights: NDArray[np.floating], target: float) -> tuple[int, float]:
    """The first index where the cumulated weights pass `target`, and the sum of those before it."""
    sums = weights.cumsum(dtype=np.float64)
    # Never beyond the last weight above 0, where rounding may put a target just under the sum.
    last = int(np.searchsorted(sums, sums[-1], side="left"))
    index = min(int(np.searchsorted(sums, target, side="right")), last)
    return index, float(sums[index - 1]) if index else 0.0


def _kth_largest(values: Floats, k: int) -> np.float32:
    return np.float32(np.partition(values, values.size - k)[values.size - k])


def _largest(values: Floats, smallest: np.float32, count: int) -> Indices:
    """Ascending indices of the `count` largest, the last of which is `smallest`; of equals, the first."""
    indices = np.flatnonzero(values >= smallest)
    surplus = indices.size - count
    if surplus == 0:
        return indices
    ties = np.flatnonzero(values[indices] == smallest)
    return np.delete(indices, ties[-surplus:])
