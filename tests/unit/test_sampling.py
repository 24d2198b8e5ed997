import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import reference_law, reference_penalties

from ssd_jax import sampling
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.types import Sampling

B, V = 4, 16
FALSE_ALARM = 1e-6  # rate at which a correct sampler would fail each chi-square test
NUM_DRAWS = 20_000

warp = jax.jit(sampling.warp)
penalize = jax.jit(sampling.penalize)
sample_tokens = jax.jit(sampling.sample_tokens)
reported_logprobs = jax.jit(sampling.reported_logprobs)


def make_sampling(rows, prompts=None, vocab_size=V):
    """Options of a batch as the device programs take them, and nothing but numpy to make them."""
    prompts = prompts or [[]] * len(rows)
    bias = np.zeros((len(rows), vocab_size), np.float32)
    seen = np.zeros((len(rows), vocab_size), bool)
    for row, (params, prompt) in enumerate(zip(rows, prompts, strict=True)):
        for token, value in params.logit_bias.items():
            bias[row, token] = value
        seen[row, prompt] = True

    def column(name, dtype):
        return jnp.array([getattr(params, name) for params in rows], dtype)

    seeds = [params.seed or 0 for params in rows]
    return Sampling(
        **{
            name: column(name, jnp.float32)
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
        },
        top_k=column("top_k", jnp.int32),
        logit_bias=jnp.asarray(bias),
        prompt_tokens=jnp.asarray(seen),
        seed=jnp.array([[seed >> 32, seed % 2**32] for seed in seeds], jnp.uint32),
        eos_ids=jnp.full((len(rows), 4), -1, jnp.int32),
        max_length=jnp.full(len(rows), 100, jnp.int32),
    )


def counts_of(outputs):
    return jnp.array([np.bincount(output, minlength=V) for output in map(np.int32, outputs)])


def law_of(logits, params, prompt=(), output=()):
    """The law of one row, which lies among neighbours with other options."""
    neighbours = [SamplingParams(temperature=1.0, top_k=2), SamplingParams(), SamplingParams()]
    options = make_sampling([params, *neighbours], [list(prompt), [], [1], []])
    rows = np.stack([np.asarray(logits, np.float32)] * B)
    return np.asarray(
        warp(rows, options, counts_of([list(output), [], [], [2, 2]]).astype(jnp.int32))
    )[0]


def assert_same_law(got, expected):
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(np.exp(got), np.exp(expected), rtol=2e-4, atol=1e-6)
    assert np.exp(got.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


LOGITS = np.random.default_rng(7).normal(0, 2, V).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": V},
        {"top_k": 100 * V},
        {"top_p": 0.5},
        {"top_p": 0.99},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 0.99},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.5},
        {"frequency_penalty": 0.7},
        {"logit_bias": {3: 4.0, 5: -np.inf, 0: -2.5}},
        {"temperature": 0.0},
        {"temperature": 0.0, "frequency_penalty": 5.0},
        {"temperature": 0.7, "top_k": 8, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_each_option_against_the_reference(options):
    params = SamplingParams(**{"temperature": 1.0} | options)
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 4]
    expected = reference_law(LOGITS, params, prompt, output)
    assert_same_law(law_of(LOGITS, params, prompt, output), expected)


# Steps of a quarter make ties; the range keeps every probability well above float32's resolution.
grid_logits = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=V, max_size=V)
some_tokens = st.lists(st.integers(0, V - 1), max_size=6)
all_options = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, V - 1, V, V + 1]),
    top_p=st.sampled_from([1.0, 1e-6, 0.3, 0.75, 0.95]),
    min_p=st.sampled_from([0.0, 0.03, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, -0.5, 0.75]),
    frequency_penalty=st.sampled_from([0.0, 0.25, 0.6]),
    logit_bias=st.dictionaries(
        st.integers(0, V - 1), st.sampled_from([-np.inf, -1.0, 0.5, 2.0]), max_size=4
    ),
)


def is_borderline(logits, params, prompt, output):
    """Whether float32 may rightly cut the law at another token than float64."""
    laws = [
        np.isfinite(reference_law(logits, dataclasses.replace(params, **change), prompt, output))
        for scale in (1 - 1e-4, 1 + 1e-4)
        for change in (
            {"top_p": params.top_p if params.top_p == 1 else min(1.0, params.top_p * scale)},
            {"min_p": params.min_p * scale},
        )
    ]
    if any((law != laws[0]).any() for law in laws):
        return True
    warped = np.sort(reference_penalties(logits, params, prompt, output))
    gaps = np.diff(warped[np.isfinite(warped)])
    return bool(((gaps > 0) & (gaps < 1e-4)).any())  # equal on paper, apart by rounding


@settings(max_examples=300)
@given(logits=grid_logits, params=all_options, prompt=some_tokens, output=some_tokens)
@example(logits=[1.0] * V, params=SamplingParams(temperature=1.0, top_k=3), prompt=[], output=[])
@example(
    logits=[2.0] * 3 + [0.0] * (V - 3),
    params=SamplingParams(temperature=1.0, top_p=0.05),
    prompt=[],
    output=[],
)
def test_any_combination_against_the_reference(logits, params, prompt, output):
    logits = np.array(logits)
    assume(np.isfinite(reference_penalties(logits, params, prompt, output)).sum() > 1)
    assume(not is_borderline(logits, params, prompt, output))
    expected = reference_law(logits, params, prompt, output)
    assert_same_law(law_of(logits, params, prompt, output), expected)


def test_ties_with_the_last_admitted_token_are_admitted():
    logits = np.array([0.0, 3.0, 2.0, 2.0, 2.0] + [-1.0] * (V - 5))
    for params in (
        SamplingParams(temperature=1.0, top_k=2),
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(temperature=1.0, min_p=0.3),
    ):
        np.testing.assert_array_equal(
            np.flatnonzero(np.isfinite(law_of(logits, params))), [1, 2, 3, 4]
        )


def test_greedy_takes_the_lowest_of_equals():
    logits = np.zeros(V)
    logits[[9, 4, 11]] = 2.0
    law = law_of(logits, SamplingParams())
    assert law[4] == 0
    assert np.isneginf(np.delete(law, 4)).all()


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": V - 1}, {"min_p": 1e-30}])
def test_no_token_is_lost_when_top_p_is_off(options):
    logits = np.full(V, -60.0)
    logits[:2] = 20.0, 0.0
    law = law_of(logits, SamplingParams(temperature=1.0, **options))
    expected = reference_law(logits, SamplingParams(temperature=1.0, **options), [], [])
    np.testing.assert_array_equal(np.isfinite(law), np.isfinite(expected))


def test_penalties_against_the_loop():
    rng = np.random.default_rng(3)
    rows = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.25),
        SamplingParams(repetition_penalty=0.8, presence_penalty=-1.0, logit_bias={2: 1.5}),
        SamplingParams(frequency_penalty=-0.5, logit_bias={0: -np.inf}),
    ]
    prompts, outputs = ([rng.integers(0, V, 5).tolist() for _ in rows] for _ in range(2))
    logits = rng.normal(0, 2, (B, V)).astype(np.float32)
    got = penalize(logits, make_sampling(rows, prompts), counts_of(outputs).astype(jnp.int32))
    expected = [
        reference_penalties(*row) for row in zip(logits, rows, prompts, outputs, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_warped_in_float32():
    low = jnp.asarray(np.stack([LOGITS] * B), jnp.bfloat16)
    options = make_sampling([SamplingParams(temperature=0.7, top_p=0.9)] * B)
    counts = jnp.zeros((B, V), jnp.int32)
    law = warp(low, options, counts)
    assert law.dtype == jnp.float32
    np.testing.assert_array_equal(law, warp(low.astype(jnp.float32), options, counts))


def test_reported_logprobs_are_the_sampling_law_or_the_plain_one_of_a_greedy_row():
    rows = [
        SamplingParams(temperature=0.7, top_k=4),
        SamplingParams(repetition_penalty=1.5, top_k=3),
        SamplingParams(temperature=2.0, top_p=0.6, presence_penalty=1.0),
        SamplingParams(logit_bias={1: 3.0}),
    ]
    outputs = [[1, 2]] * B
    logits = np.stack([LOGITS] * B)
    got = reported_logprobs(logits, make_sampling(rows), counts_of(outputs).astype(jnp.int32))
    np.testing.assert_allclose(np.exp(np.float64(got)).sum(axis=1), 1, atol=1e-5)
    for row, params in enumerate(rows):
        shown = params
        if params.temperature == 0:
            shown = dataclasses.replace(params, temperature=1.0, top_k=0)
        assert_same_law(np.asarray(got[row]), reference_law(LOGITS, shown, [], outputs[row]))


def draw(law, rows, positions):
    laws = np.broadcast_to(np.asarray(law, np.float32), (len(rows), len(law)))
    options = make_sampling(rows, vocab_size=len(law))
    return np.asarray(sample_tokens(laws, options, jnp.asarray(positions, jnp.int32)))


def test_a_draw_depends_on_seed_and_position_alone():
    law = reference_law(LOGITS, SamplingParams(temperature=2.0), [], [])
    mine = SamplingParams(temperature=1.0, seed=2**63 + 5)
    others = [SamplingParams(), SamplingParams(temperature=1.0, seed=1), mine]
    rng = np.random.default_rng(0)
    for position in range(50):
        tokens = set()
        for row in range(B):
            neighbours = [others[i] for i in rng.integers(0, len(others), B)]
            neighbours[row] = mine
            positions = rng.integers(0, 1000, B)
            positions[row] = position
            tokens.add(draw(law, neighbours, positions)[row])
        assert len(tokens) == 1


@pytest.mark.parametrize("other_seed", [6, 5 + 2**32, 5 + 2**63])
def test_both_words_of_the_seed_count(other_seed):
    law = np.log(np.full(V, 1 / V))
    positions = range(B * 50)
    first, second = (
        draw(law, [SamplingParams(temperature=1.0, seed=seed)] * len(positions), positions)
        for seed in (5, other_seed)
    )
    assert 0.3 > np.mean(first == second) > 0.001  # 1 / V by chance


def test_a_point_mass_is_drawn_whatever_the_noise():
    law = reference_law(LOGITS, SamplingParams(), [], [])
    greedy_among_sampled = [SamplingParams(), SamplingParams(temperature=1.0, seed=3)] * 100
    tokens = draw(law, greedy_among_sampled, range(200))
    np.testing.assert_array_equal(tokens, LOGITS.argmax())


LAW = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01]))


def chi_square_p(observed, expected):
    return scipy.stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("varied", ["position", "seed"])
def test_draws_follow_the_law(varied):
    numbers = range(NUM_DRAWS)
    if varied == "position":
        tokens = draw(LAW, [SamplingParams(temperature=1.0, seed=11)] * NUM_DRAWS, numbers)
    else:
        rows = [SamplingParams(temperature=1.0, seed=seed) for seed in numbers]
        tokens = draw(LAW, rows, [17] * NUM_DRAWS)
    observed = np.bincount(tokens, minlength=len(LAW))
    assert chi_square_p(observed, NUM_DRAWS * np.exp(LAW)) > FALSE_ALARM
    pairs = np.bincount(tokens[:-1:2] * len(LAW) + tokens[1::2], minlength=len(LAW) ** 2)
    independent = NUM_DRAWS / 2 * np.outer(np.exp(LAW), np.exp(LAW)).ravel()
    common = independent >= 5  # the chi-square approximation needs cells that are not too rare
    observed = np.append(pairs[common], pairs[~common].sum())
    expected = np.append(independent[common], independent[~common].sum())
    assert chi_square_p(observed, expected) > FALSE_ALARM


def test_the_chi_square_test_would_notice():
    wrong = np.exp(LAW) + np.array([0.02, -0.02, 0, 0, 0, 0, 0])
    tokens = draw(LAW, [SamplingParams(temperature=1.0, seed=11)] * NUM_DRAWS, range(NUM_DRAWS))
    observed = np.bincount(tokens, minlength=len(LAW))
    assert chi_square_p(observed, NUM_DRAWS * wrong) < FALSE_ALARM
