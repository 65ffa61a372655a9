from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling_reference import ranked, reference_distribution, reference_draw, row
from pocketlm.errors import InvalidSettingError, PocketlmError, PromptError
from pocketlm.sampling import MAX_TOP_LOGPROBS, Sampler, Sampling

properties = settings(deadline=None, max_examples=60)


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
        token, *_ = sampler.sample(row(values))
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
    sampler = Sampler(sampling, len(values), [], top_logprobs=0)
    token, logprob, top = sampler.sample(logits)
    exact = logits.astype(np.float64)
    assert logprob == pytest.approx(exact[token] - np.logaddexp.reduce(exact), abs=2e-5)
    assert top == ()
    np.testing.assert_array_equal(logits, before)


@given(st.lists(st.sampled_from([-math.inf, *range(-9, 9)]), max_size=300), st.integers(0, MAX_TOP_LOGPROBS))
@properties
def test_top_log_probabilities_fall_and_equals_rank_by_id(values: list[float], count: int) -> None:
    logits = row([0.0, *values])
    sampled = Sampler(Sampling(), logits.size, [], top_logprobs=count).sample(logits)
    likely = [i for i in ranked(logits.tolist())[:count] if logits[i] > -math.inf]
    assert [token for token, _ in sampled.top] == likely
    total = np.logaddexp.reduce(logits.astype(np.float64))
    assert [logprob for _, logprob in sampled.top] == pytest.approx(
        [logits[i] - total for i in likely], abs=2e-5
    )
    if count:
        assert sampled.top[0] == (sampled.token_id, sampled.logprob)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_change_no_choice(temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=1, frequency_penalty=0.5)
    plain, reporting = (Sampler(sampling, 500, [], top_logprobs=count) for count in (None, 5))
    for logits in np.random.default_rng(0).standard_normal((20, 500)).astype(np.float32):
        sampled = plain.sample(logits)
        assert sampled == (sampled.token_id, None, ())
        assert reporting.sample(logits).token_id == sampled.token_id


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_cannot_end_before_min_tokens(temperature: float) -> None:
    # Step 4 comes after the bias, which would otherwise force an end.
    sampling = Sampling(temperature=temperature, seed=0, logit_bias={1: 100.0, 2: 90.0})
    sampler = Sampler(sampling, 4, [], min_tokens=3, eos=(1, 2), top_logprobs=0)
    logits = row([5.0, 0.0, 0.0, -5.0])
    sampled = [sampler.sample(logits) for _ in range(5)]
    assert [each.token_id in (1, 2) for each in sampled] == [False] * 3 + [True] * 2
    total = math.log(math.exp(5) + 2 + math.exp(-5))  # of what was passed in
    assert sampled[0].logprob == pytest.approx(logits[sampled[0].token_id] - total, abs=1e-6)


def test_an_answer_that_can_only_end_does() -> None:
    sampler = Sampler(Sampling(), 3, [], min_tokens=9, eos=[1])
    assert sampler.sample(row([-np.inf, 2.0, -np.inf])).token_id == 1


def test_min_tokens_without_eos_changes_nothing() -> None:
    assert Sampler(Sampling(), 2, [], min_tokens=9).sample(row([0.0, 1.0])).token_id == 1


def test_a_fork_has_the_history_and_numbers_of_its_own() -> None:
    settings_of = {"temperature": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.3}
    logits = np.random.default_rng(3).standard_normal((40, 200)).astype(np.float32)
    sampler = Sampler(Sampling(seed=7, **settings_of), 200, [4, 5])
    twins = [sampler.fork(index) for index in (0, 1)]
    chosen = [[each.sample(values).token_id for values in logits] for each in (*twins, sampler)]
    same, other, own = chosen
    assert own == same != other
    fresh = Sampler(Sampling(seed=8, **settings_of), 200, [4, 5])
    assert [fresh.sample(values).token_id for values in logits] == other


def test_a_fork_in_the_middle_keeps_what_was_chosen_and_goes_its_own_way() -> None:
    logits = row([2.0, 1.0, 0.0])
    sampler = Sampler(Sampling(presence_penalty=1.5), 3, [], min_tokens=2, eos=[2])
    assert sampler.sample(logits).token_id == 0
    twin = sampler.fork(1)
    assert [twin.sample(row([0.0, 1.0, 9.0])).token_id for _ in range(2)] == [1, 2]
    assert [sampler.sample(logits).token_id for _ in range(2)] == [1, 0]


def test_forks_without_a_seed_differ() -> None:
    sampler = Sampler(Sampling(temperature=5.0), 1000, [])
    twins = [sampler.fork(index) for index in (0, 1)]
    logits = np.zeros(1000, dtype=np.float32)
    assert len({tuple(each.sample(logits).token_id for _ in range(9)) for each in (sampler, *twins)}) == 3


def test_each_sampled_token_takes_one_number() -> None:
    """Whatever was chosen before, the n-th token has the n-th number."""
    logits = row([0.0] * 100)
    uniforms = np.random.Generator(np.random.PCG64(2026)).random(5)
    sampler = Sampler(Sampling(temperature=1.0, top_k=100, seed=2026), 100, [])
    sampler.sample(row([9e9] + [0.0] * 99))
    assert [sampler.sample(logits).token_id for _ in range(4)] == [int(100 * each) for each in uniforms[1:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_logprobs": 21}, "top_logprobs is 21, expected an integer from 0 to 20"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
        ({"top_logprobs": True}, "top_logprobs is True"),
        ({"top_logprobs": 1.0}, "top_logprobs is 1.0"),
        ({"min_tokens": -1}, "min_tokens is -1, expected an integer, 0 or above"),
        ({"min_tokens": None}, "min_tokens is None"),
        ({"eos": [3, 10]}, "eos names token 10, but the vocabulary ends at 9"),
        ({"eos": ["a"]}, "a token id of eos is 'a'"),
    ],
)
def test_refuses_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        Sampler(Sampling(), 10, [], **options)


@pytest.mark.parametrize("index", [-1, 1.0, None])
def test_refuses_to_fork_for_no_index(index: Any) -> None:
    with pytest.raises(InvalidSettingError, match="index is"):
        Sampler(Sampling(), 10, []).fork(index)


def test_greedy_takes_the_first_of_the_largest() -> None:
    sampled = Sampler(Sampling(), 4, [], top_logprobs=0).sample(row([0, 3, 3, -np.inf]))
    assert sampled.token_id == 1
    assert sampled.logprob == pytest.approx(-math.log(2 + math.exp(-3)), abs=1e-6)


@pytest.mark.parametrize("temperature", [1e39, 1e308])
def test_the_largest_temperatures_are_uniform_over_what_may_come(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=0), 3, [])
    assert {sampler.sample(row([-np.inf, 1e30, -1e30])).token_id for _ in range(40)} == {1, 2}


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
