from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocketlm.errors import InvalidSettingError, PocketlmError, PromptError
from pocketlm.sampling import Sampler, Sampling, draw, min_p, softmax_weights, top_k, top_p

properties = settings(deadline=None, max_examples=60)

# Whole numbers as weights, and shares in 1024ths: everything is exact, down to ties.
whole_numbers = st.one_of(
    st.lists(st.integers(0, 50), min_size=1, max_size=70).filter(any),
    st.builds(
        lambda seed, size: np.random.default_rng(seed).geometric(0.002, size).tolist(),
        st.integers(0, 2**32),
        st.integers(1, 2000),
    ),
)
shares = st.integers(0, 1024).map(lambda share: share / 1024)


def row(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def ranked(values: Sequence[float]) -> list[int]:
    """Ids by falling value; of equals, the lowest first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def reference_top_p(weights: Sequence[float], p: float) -> list[int]:
    order, held = ranked(weights), 0.0
    for count, index in enumerate(order, start=1):
        held += weights[index]
        if held >= p * sum(weights):
            return sorted(order[:count])
    raise AssertionError("all of them hold any share")


def reference_draw(weights: Sequence[float], uniform: float) -> int:
    passed = 0.0
    for index, weight in enumerate(weights):
        passed += weight
        if passed > uniform * sum(weights):
            return index
    raise AssertionError("uniform is below 1")


def reference_distribution(
    logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> dict[int, float]:
    """The steps as the module's docstring gives them, one token at a time, in double precision."""
    values = list(map(float, logits))
    for token, bias in sampling.logit_bias.items():
        values[token] += bias
    for token in {*prompt, *answer}:
        if values[token] > 0:
            values[token] /= sampling.repetition_penalty
        else:
            values[token] *= sampling.repetition_penalty
    for token, count in Counter(answer).items():
        values[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature == 0:
        return {ranked(values)[0]: 1.0}
    kept = sorted(ranked(values)[: sampling.top_k or len(values)])
    highest = max(values)
    weights = [math.exp((values[token] - highest) / sampling.temperature) for token in kept]
    if sampling.top_p < 1:
        chosen = reference_top_p(weights, sampling.top_p)
        kept, weights = [kept[i] for i in chosen], [weights[i] for i in chosen]
    if sampling.min_p > 0:
        chosen = [i for i, weight in enumerate(weights) if weight >= sampling.min_p * max(weights)]
        kept, weights = [kept[i] for i in chosen], [weights[i] for i in chosen]
    return dict(zip(kept, weights, strict=True))


@given(whole_numbers, st.data())
@properties
def test_top_k_keeps_the_k_largest(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    assert top_k(row(values), k).tolist() == sorted(ranked(values)[:k])


@given(st.integers(0, 2**32), st.integers(64, 5000), st.integers(1, 60))
@properties
def test_top_k_on_a_vocabulary(seed: int, size: int, k: int) -> None:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values[values < -1] = -np.inf
    assert top_k(values, k).tolist() == sorted(ranked(values.tolist())[:k])


@given(whole_numbers, shares)
@properties
def test_top_p_keeps_the_fewest_that_hold_the_share(weights: list[int], p: float) -> None:
    kept = top_p(row(weights), p)
    assert kept.tolist() == reference_top_p(weights, p)
    assert len(kept) >= 1


@given(whole_numbers, shares)
@properties
def test_min_p_keeps_what_is_likely_enough(weights: list[int], p: float) -> None:
    kept = [i for i, weight in enumerate(weights) if weight >= p * max(weights)]
    assert min_p(row(weights), p).tolist() == kept


@given(whole_numbers, shares.filter(lambda share: share < 1))
@properties
def test_draw_inverts_the_cumulated_weights(weights: list[int], uniform: float) -> None:
    assert draw(row(weights), uniform) == reference_draw(weights, uniform)


@pytest.mark.parametrize("size", [1, 3, 64, 65, 1000, 4097])
def test_draw_never_goes_beyond_the_last_weight(size: int) -> None:
    weights = np.zeros(size + 7, dtype=np.float32)
    weights[:size] = 0.1
    assert draw(weights, math.nextafter(1, 0)) == size - 1
    assert draw(weights, 0.0) == 0
    assert draw(weights[::-1], 0.0) == 7


@given(
    values=st.lists(st.integers(-80, 40).map(lambda n: n / 8), min_size=1, max_size=100),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 20),
    top_p=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.13, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
    presence_penalty=st.sampled_from([-0.5, 0.0, 1.25]),
    frequency_penalty=st.sampled_from([-0.25, 0.0, 0.5]),
    bias=st.dictionaries(st.integers(0, 199), st.integers(-3, 9), max_size=3),
    prompt=st.lists(st.integers(0, 199), max_size=5),
    seed=st.integers(0, 1000),
)
@settings(properties, max_examples=150)
def test_sampler_follows_the_documented_order(
    values: list[float], bias: dict[int, int], prompt: list[int], seed: int, **options: Any
) -> None:
    bias = {token % len(values): value for token, value in bias.items()}
    prompt = [token % len(values) for token in prompt]
    sampling = Sampling(logit_bias=bias, seed=seed, **options)
    sampler, uniforms = Sampler(sampling, len(values), prompt), np.random.Generator(np.random.PCG64(seed))
    answer: list[int] = []
    for _ in range(6):
        token, _ = sampler.sample(row(values))
        distribution = reference_distribution(values, sampling, prompt, answer)
        tokens, weights = list(distribution), list(distribution.values())
        if sampling.temperature == 0:
            assert token == tokens[0]
        else:
            # One uniform number a token; exponentials in single precision may move a border by a hair.
            uniform = uniforms.random()
            near = [min(max(uniform + shift, 0.0), 1 - 1e-9) for shift in (-1e-5, 0.0, 1e-5)]
            assert token in {tokens[reference_draw(weights, number)] for number in near}
        answer.append(token)


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=300), st.integers(0, 99))
@properties
def test_log_probability_is_the_models_own(values: list[float], seed: int) -> None:
    logits = row(values)
    before = logits.copy()
    sampling = Sampling(temperature=3.0, top_k=5, presence_penalty=1.0, logit_bias={0: 2.0}, seed=seed)
    token, logprob = Sampler(sampling, len(values), []).sample(logits)
    exact = logits.astype(np.float64)
    assert logprob == pytest.approx(exact[token] - np.logaddexp.reduce(exact), abs=2e-5)
    assert logprob <= 1e-6
    np.testing.assert_array_equal(logits, before)


def test_greedy_takes_the_first_of_the_largest() -> None:
    token, logprob = Sampler(Sampling(), 4, []).sample(row([0, 3, 3, -np.inf]))
    assert token == 1
    assert logprob == pytest.approx(-math.log(2 + math.exp(-3)), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9999}, {"min_p": 1e-6}])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_samples_follow_the_softmax(temperature: float, options: dict[str, Any]) -> None:
    logits, count = row([1.0, 0.0, -1.0, 2.0, -np.inf, 0.5]), 4000
    sampler = Sampler(Sampling(temperature=temperature, seed=1, **options), 6, [])
    seen = Counter(sampler.sample(logits)[0] for _ in range(count))
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = count * weights / weights.sum()
    assert seen[4] == 0
    finite = [0, 1, 2, 3, 5]
    chi_squared = sum((seen[i] - expected[i]) ** 2 / expected[i] for i in finite)
    assert chi_squared < 18.5  # the 99.9 % quantile with 4 degrees of freedom


def tokens_of(sampling: Sampling, count: int = 12, size: int = 1000) -> list[int]:
    sampler = Sampler(sampling, size, [])
    logits = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return [sampler.sample(logits)[0] for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 50}, {"frequency_penalty": 0.5}])
def test_the_seed_decides(options: dict[str, Any]) -> None:
    same = Sampling(temperature=1.0, seed=5, **options)
    assert tokens_of(same) == tokens_of(same)
    assert tokens_of(same) != tokens_of(Sampling(temperature=1.0, seed=6, **options))


def test_no_seed_differs_from_run_to_run() -> None:
    assert tokens_of(Sampling(temperature=5.0)) != tokens_of(Sampling(temperature=5.0))


def test_the_seeds_numbers_never_change() -> None:
    """Equal logits make a token a plain reading of the random number: these are the same everywhere."""
    sampler = Sampler(Sampling(temperature=1.0, seed=2026), 100, [])
    assert [sampler.sample(row([0.0] * 100))[0] for _ in range(8)] == [17, 63, 46, 37, 35, 79, 90, 17]


def test_repetition_penalty_looks_at_the_prompt_and_the_others_do_not() -> None:
    logits = row([2.0, 1.9])
    assert Sampler(Sampling(repetition_penalty=1.5), 2, [0]).sample(logits)[0] == 1
    assert Sampler(Sampling(presence_penalty=1.5), 2, [0]).sample(logits)[0] == 0
    assert Sampler(Sampling(frequency_penalty=1.5), 2, [0]).sample(logits)[0] == 0


def test_frequency_penalty_counts_and_presence_penalty_does_not() -> None:
    logits = row([2.0, 0.0])
    frequency, presence = (
        Sampler(sampling, 2, [])
        for sampling in (Sampling(frequency_penalty=0.75), Sampling(presence_penalty=0.75))
    )
    assert [frequency.sample(logits)[0] for _ in range(5)] == [0, 0, 0, 1, 0]
    assert [presence.sample(logits)[0] for _ in range(5)] == [0] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_can_force_and_forbid(temperature: float) -> None:
    logits = row([0.0, 25.0, 0.0])
    forbid = Sampler(Sampling(temperature=temperature, seed=0, logit_bias={1: -100.0}), 3, [])
    assert 1 not in [forbid.sample(logits)[0] for _ in range(20)]
    force = Sampler(Sampling(temperature=temperature, seed=0, logit_bias={2: 100}), 3, [])
    assert [force.sample(logits)[0] for _ in range(20)] == [2] * 20


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=0), 4, [])
    assert sampler.sample(row([-3e38, 1.0, 1.25, 3e38]))[0] == 3


def test_a_huge_temperature_is_uniform() -> None:
    weights = softmax_weights(row([-50.0, 0.0, 50.0]), 1e9)
    np.testing.assert_allclose(weights, 1.0, atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_logits_that_are_no_numbers(sampling: Sampling, bad: float) -> None:
    with pytest.raises(PocketlmError, match=f"token 2 is {bad}"):
        Sampler(sampling, 4, []).sample(row([1.0, 9.0, bad, 0.0]))


def test_refuses_a_bias_that_overflows() -> None:
    with pytest.raises(PocketlmError, match="token 1 is inf"):
        Sampler(Sampling(logit_bias={1: 1e300}), 3, []).sample(row([0.0, 0.0, 0.0]))


def test_refuses_when_every_token_is_masked() -> None:
    with pytest.raises(PocketlmError, match="every token is masked"):
        Sampler(Sampling(), 2, []).sample(row([-np.inf, -np.inf]))


@pytest.mark.parametrize("shape", [(4,), (1, 3), (0,)])
def test_refuses_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidSettingError, match=r"expected \(3,\)"):
        Sampler(Sampling(), 3, []).sample(np.zeros(shape, dtype=np.float32))


def test_refuses_ids_outside_the_vocabulary() -> None:
    with pytest.raises(InvalidSettingError, match="token 10, but the vocabulary ends at 9"):
        Sampler(Sampling(logit_bias={3: 1.0, 10: 1.0}), 10, [])
    with pytest.raises(InvalidSettingError, match=f"token {2**70}, but"):
        Sampler(Sampling(logit_bias={2**70: 1.0}), 10, [])
    for token in (10, -1):
        with pytest.raises(PromptError, match=f"id {token}, but the vocabulary ends at 9"):
            Sampler(Sampling(repetition_penalty=1.1), 10, [0, token])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1", None, True])
@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"],
)
def test_refuses_settings_that_are_no_finite_numbers(name: str, value: object) -> None:
    with pytest.raises(InvalidSettingError, match=f"{name} is .*, expected a"):
        Sampling(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a finite number, 0 or above"),
        ({"top_p": 1.01}, "top_p is 1.01, expected a number from 0 to 1"),
        ({"top_p": -0.01}, "top_p is -0.01"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a finite number above 0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan, expected a finite number"),
        ({"top_k": -1}, "top_k is -1, expected an integer, 0 or above"),
        ({"top_k": 1.0}, "top_k is 1.0"),
        ({"top_k": True}, "top_k is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"logit_bias": {"5": 1.0}}, "a token id of logit_bias is '5'"),
        ({"logit_bias": {5: math.inf}}, "logit_bias of token 5 is inf"),
        ({"logit_bias": [1, 2]}, "expected a mapping"),
    ],
)
def test_refuses_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        Sampling(**options)


def test_settings_are_a_copy_and_may_be_numpys() -> None:
    bias = {1: 1.0}
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(4), logit_bias=bias)
    bias[1] = math.nan
    assert sampling.logit_bias == {1: 1.0}
    assert len(tokens_of(sampling)) == 12
