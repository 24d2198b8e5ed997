"""Verdicts on drafts: the law of what is emitted, and the very tokens of coupled sampling."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax import verification
from ssd_jax.sampling import Purpose, sample_tokens
from ssd_jax.types import Draft, Sampling
from ssd_jax.verification import verify, verify_rejection

FALSE_ALARM = 1e-6  # rate at which a correct verification would fail each chi-square test
NUM_ROWS = 20_000  # independent seeds a test
V, J = 5, 3
NUM_TOKENS = 3  # emitted tokens whose joint law is tested; rounds overlap them in every way
SMALLEST_EXPECTED = 5.0  # cells expecting fewer are counted together

sample = jax.jit(sample_tokens, static_argnums=3)
verify_jitted = jax.jit(verify, static_argnums=0)


def make_sampling(seeds, temperature=1.0, vocab_size=V):
    """Options of rows that differ in nothing but seeds (and temperatures, if given as an array)."""
    rows = len(seeds)
    words = np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
    return Sampling(
        temperature=jnp.broadcast_to(jnp.float32(temperature), (rows,)),
        top_k=jnp.zeros(rows, jnp.int32),
        top_p=jnp.ones(rows, jnp.float32),
        min_p=jnp.zeros(rows, jnp.float32),
        repetition_penalty=jnp.ones(rows, jnp.float32),
        presence_penalty=jnp.zeros(rows, jnp.float32),
        frequency_penalty=jnp.zeros(rows, jnp.float32),
        logit_bias=jnp.zeros((rows, vocab_size), jnp.float32),
        prompt_tokens=jnp.zeros((rows, vocab_size), bool),
        seed=jnp.asarray(words),
        eos_ids=jnp.full((rows, 4), -1, jnp.int32),
        max_length=jnp.full(rows, 100, jnp.int32),
    )


def make_draft(tokens, count, law=None):
    """A draft of the only drafter there is."""
    tokens, count = jnp.asarray(tokens), jnp.asarray(count)
    return Draft(tokens=tokens, count=count, law=law, drafter=jnp.zeros_like(count))


@functools.partial(jax.jit, static_argnames="with_law")
def simulate(target, drafter, counts, sampling, *, with_law):
    """Texts [B NUM_TOKENS] that start after token 0: as many rounds as certainly fill them.

    The models are tables of log-probabilities of the next token given the last one. counts[r, b]
    tokens of row b are drafted in round r.
    """
    rows = jnp.arange(counts.shape[1], dtype=jnp.int32)

    def play(carry, count):
        text, lengths = carry
        token = text[rows, lengths - 1]
        drafted, laws, drafter_laws = [], [target[token]], []
        for step in range(J):
            drafter_laws.append(drafter[token])
            token = sample_tokens(drafter[token], sampling, lengths + step, Purpose.DRAFT)
            drafted.append(token)
            laws.append(target[token])
        law = jnp.stack(drafter_laws, axis=1) if with_law else None
        draft = make_draft(jnp.stack(drafted, axis=1), count, law)
        verdict = verify_rejection(draft, jnp.stack(laws, axis=1), sampling, lengths)
        for step in range(J):
            stands = verdict.num_accepted > step
            column = jnp.where(stands, lengths + step, text.shape[1])
            text = text.at[rows, column].set(drafted[step], mode="drop")
        lengths = lengths + verdict.num_accepted + 1
        return (text.at[rows, lengths - 1].set(verdict.bonus_token), lengths), None

    text = jnp.full((len(rows), 1 + NUM_TOKENS * (J + 1)), -1, jnp.int32).at[:, 0].set(0)
    (text, _), _ = jax.lax.scan(play, (text, jnp.ones_like(rows)), counts)
    return text[:, 1 : 1 + NUM_TOKENS]


def table(*rows):
    """Log-probabilities [V V] from rows of weights, which are repeated until there are V."""
    weights = np.array([rows[i % len(rows)] for i in range(V)], np.float64)
    with np.errstate(divide="ignore"):
        return np.log(weights / weights.sum(axis=1, keepdims=True))


def one_hot(choices):
    return table(*np.eye(V)[list(choices)])


def joint_law(target):
    """Probabilities [V^NUM_TOKENS] of all texts of NUM_TOKENS tokens after token 0."""
    p = np.exp(target)
    joint = p[0]
    for _ in range(NUM_TOKENS - 1):
        joint = (joint.reshape(-1, V)[..., None] * p).reshape(-1)
    return joint


def p_value(observed, expected):
    """Chi-square p-value of counts; 0 if anything impossible was seen."""
    if observed[expected == 0].any():
        return 0.0
    rare = expected < SMALLEST_EXPECTED
    observed = np.array([*observed[~rare], observed[rare].sum()])
    expected = np.array([*expected[~rare], expected[rare].sum()])
    possible = expected > 0
    if possible.sum() == 1:
        return 1.0
    return scipy.stats.chisquare(observed[possible], expected[possible]).pvalue


MARKOV = table([4, 3, 2, 1, 0.5], [1, 1, 1, 1, 1], [0.1, 5, 0.1, 1, 1], [1, 2, 3, 4, 5])
FLAT = table([1, 1, 1, 1, 1])
PEAKED = table([0.001, 0.001, 1, 0.001, 0.001], [1, 0.001, 0.001, 0.001, 0.001])
ISSUE_P = table([0.4, 0.3, 0.2, 0.1, 0.0])
ISSUE_Q = table([0.1, 0.4, 0.3, 0.2, 0.0])
HALVES = table([3, 2, 1, 0, 0]), table([0, 0, 0, 1, 4])
WITH_LAW = {
    "the example of the issue": (ISSUE_P, ISSUE_Q),
    "equal": (MARKOV, MARKOV),
    "disjoint": HALVES,
    "peaked draft": (MARKOV, PEAKED),
    "peaked target": (PEAKED, MARKOV),
    "uniform draft": (MARKOV, FLAT),
    "draft without tokens the target has": (MARKOV, table([1, 0, 2, 0, 1], [0, 0, 0, 1, 1])),
    "target without tokens the draft has": (table([1, 0, 2, 0, 1], [0, 0, 0, 1, 1]), MARKOV),
    "greedy draft with its law": (MARKOV, one_hot([1, 2, 3, 4, 0])),
    "greedy target": (one_hot([1, 2, 3, 4, 0]), MARKOV),
    "reversed": (MARKOV, MARKOV[:, ::-1]),
}
POINT_MASSES = {
    "the likeliest token": (MARKOV, one_hot([0, 0, 1, 4, 0])),
    "an unlikely token": (MARKOV, one_hot([4, 4, 0, 0, 4])),
    "an impossible token": (HALVES[0], one_hot([4, 3, 4, 3, 4])),
    "now possible, now not": (HALVES[0], one_hot([1, 4, 0, 0, 0])),
    "the only possible token": (one_hot([1, 2, 3, 4, 0]), one_hot([1, 2, 3, 4, 0])),
    "random tokens": (MARKOV, FLAT),
    "the example of the issue": (ISSUE_P, ISSUE_Q),
}


def counts_for(kind):
    """Drafted tokens a row and round: all, or every number from none to all."""
    if kind == "full":
        return jnp.full((NUM_TOKENS, NUM_ROWS), J, jnp.int32)
    rows, rounds = np.arange(NUM_ROWS), np.arange(NUM_TOKENS)[:, None]
    return jnp.asarray((rows // (J + 1) ** rounds % (J + 1)).astype(np.int32))


def texts(target, drafter, kind, with_law, first_seed=0):
    sampling = make_sampling(range(first_seed, first_seed + NUM_ROWS))
    laws = np.float32(target), np.float32(drafter)
    return np.asarray(simulate(*laws, counts_for(kind), sampling, with_law=with_law))


def p_value_of(emitted, target):
    """Of the joint law of a text's tokens, in cells numbered as `joint_law` does."""
    cells = emitted @ V ** np.arange(NUM_TOKENS)[::-1]
    return p_value(np.bincount(cells, minlength=V**NUM_TOKENS), joint_law(target) * NUM_ROWS)


@pytest.mark.parametrize("kind", ["full", "ragged"])
@pytest.mark.parametrize("name", WITH_LAW)
def test_emitted_tokens_follow_the_targets_law(name, kind):
    target, drafter = WITH_LAW[name]
    emitted = texts(target, drafter, kind, with_law=True, first_seed=7 << 32)
    assert p_value_of(emitted, target) > FALSE_ALARM


@pytest.mark.parametrize("kind", ["full", "ragged"])
@pytest.mark.parametrize("name", POINT_MASSES)
def test_emitted_tokens_follow_the_targets_law_after_point_masses(name, kind):
    target, drafter = POINT_MASSES[name]
    assert p_value_of(texts(target, drafter, kind, with_law=False), target) > FALSE_ALARM


def test_the_law_of_accepting_only_the_targets_best_would_be_noticed():
    """What a known implementation samples instead: accept the argmax, else draw from p again."""
    p, q = np.exp(ISSUE_P[0]), np.exp(ISSUE_Q[0])
    biased = q[0] * np.eye(V)[0] + (1 - q[0]) * p
    np.testing.assert_allclose(biased, [0.46, 0.27, 0.18, 0.09, 0], atol=1e-12)
    rng = np.random.default_rng(0)
    observed = rng.multinomial(NUM_ROWS, biased)
    assert p_value(observed, p * NUM_ROWS) < FALSE_ALARM**2
    first = texts(ISSUE_P, ISSUE_Q, "full", with_law=True)[:, 0]
    assert p_value(np.bincount(first, minlength=V), p * NUM_ROWS) > FALSE_ALARM
    assert p_value(np.bincount(first, minlength=V), biased * NUM_ROWS) < FALSE_ALARM**2


@pytest.mark.parametrize("name", ["draft law kept", "draft law forgotten"])
def test_a_wrong_draft_law_would_be_noticed(name):
    """Tokens drawn from q but verified as point masses are right; with a wrong q they are not."""
    target, drafter = np.float32(ISSUE_P), np.float32(ISSUE_Q)
    sampling = make_sampling(range(NUM_ROWS))
    positions = jnp.ones(NUM_ROWS, jnp.int32)
    token = sample_tokens(jnp.tile(drafter[0], (NUM_ROWS, 1)), sampling, positions, Purpose.DRAFT)
    law = drafter if name == "draft law kept" else np.float32(FLAT)
    draft = make_draft(token[:, None], positions, jnp.tile(law[0], (NUM_ROWS, 1))[:, None])
    laws = jnp.tile(target[0], (NUM_ROWS, 2, 1))
    verdict = verify_jitted("rejection", draft, laws, sampling, positions)
    first = np.where(verdict.num_accepted > 0, token, verdict.bonus_token)
    right = p_value(np.bincount(first, minlength=V), np.exp(ISSUE_P[0]) * NUM_ROWS) > FALSE_ALARM
    assert right == (name == "draft law kept")


def one_row(tokens, laws, draft_laws, count=None, seed=0):
    """Draft, laws and options of a single row from probabilities."""
    with np.errstate(divide="ignore"):
        laws = jnp.asarray(np.log(np.float32(laws)))[None]
        q = None if draft_laws is None else jnp.asarray(np.log(np.float32(draft_laws)))[None]
    count = len(tokens) if count is None else count
    draft = make_draft(jnp.array([tokens], jnp.int32), jnp.array([count], jnp.int32), q)
    return draft, laws, make_sampling([seed], vocab_size=laws.shape[-1]), jnp.array([9], jnp.int32)


@pytest.mark.parametrize("draft_laws", [None, [[0.5, 0.5]], [[0.0, 1.0]]])
def test_a_token_of_probability_zero_is_refused_even_by_a_uniform_number_of_zero(
    monkeypatch, draft_laws
):
    monkeypatch.setattr(verification, "_uniforms", lambda _, positions: jnp.zeros(positions.shape))
    verdict = jax.jit(lambda *case: verify_rejection(*case))(
        *one_row([1], [[1.0, 0.0], [1.0, 0.0]], draft_laws)
    )
    assert verdict.num_accepted.tolist() == [0]
    assert verdict.bonus_token.tolist() == [0]


@pytest.mark.parametrize("draft_laws", [None, [[0.0, 1.0]], [[0.25, 0.75]]])
def test_a_token_that_the_target_likes_at_least_as_well_always_stands(monkeypatch, draft_laws):
    largest = np.float32(1 - 2.0**-24)
    monkeypatch.setattr(
        verification, "_uniforms", lambda _, positions: jnp.full(positions.shape, largest)
    )
    verdict = jax.jit(lambda *case: verify_rejection(*case))(
        *one_row([1], [[0.0, 1.0], [1.0, 0.0]], draft_laws)
    )
    assert verdict.num_accepted.tolist() == [1]
    assert verdict.bonus_token.tolist() == [0]


def test_equal_laws_accept_everything():
    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet(np.full(6, 0.3), (4, J + 1))
    laws = jnp.asarray(np.log(np.float32(probabilities)))
    best = np.argmax(probabilities[:, :J], axis=-1).astype(np.int32)
    draft = make_draft(best, jnp.array([3, 2, 1, 0], jnp.int32), laws[:, :J])
    sampling = make_sampling(range(4), vocab_size=6)
    verdict = verify_jitted("rejection", draft, laws, sampling, jnp.arange(4, dtype=jnp.int32))
    assert verdict.num_accepted.tolist() == [3, 2, 1, 0]


def random_case(seed, rows=8, vocab_size=6):
    """Laws with zeros, a draft that often agrees with the target, any counts, mixed temperatures.

    Greedy rows have point masses, as `warp` gives them.
    """
    rng = np.random.default_rng(seed)
    greedy = rng.random(rows) < 0.3
    with np.errstate(divide="ignore"):
        laws = np.log(rng.dirichlet(np.full(vocab_size, 0.5), (rows, J + 1)) * 1.0)
        laws[rng.random(laws.shape) < 0.2] = -np.inf
        laws[..., 0] = np.maximum(laws[..., 0], -5.0)
        laws -= np.log(np.exp(laws).sum(axis=-1, keepdims=True))
        best = np.eye(vocab_size)[np.argmax(laws, axis=-1)]
        laws = np.float32(np.where(greedy[:, None, None], np.log(best), laws))
    sampling = make_sampling(
        rng.integers(2**63, size=rows).tolist(), np.where(greedy, 0.0, 1.0), vocab_size
    )
    positions = rng.integers(1, 1000, rows).astype(np.int32)
    own = np.stack(
        [
            sample(laws[:, step], sampling, positions + np.int32(step), Purpose.TOKEN)
            for step in range(J + 1)
        ],
        axis=1,
    )
    guesses = rng.integers(vocab_size, size=(rows, J))
    tokens = np.where(rng.random((rows, J)) < 0.7, own[:, :J], guesses).astype(np.int32)
    count = rng.integers(0, J + 1, rows).astype(np.int32)
    return jnp.asarray(laws), sampling, jnp.asarray(positions), own, tokens, count


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_coupled_emits_what_the_target_samples_whatever_was_drafted(seed):
    laws, sampling, positions, own, tokens, count = random_case(seed)
    draft = make_draft(tokens, count)
    verdict = verify_jitted("coupled", draft, laws, sampling, positions)
    for row in range(len(count)):
        accepted = 0
        while accepted < count[row] and tokens[row, accepted] == own[row, accepted]:
            accepted += 1
        assert verdict.num_accepted[row] == accepted
        assert verdict.bonus_token[row] == own[row, accepted]


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.booleans())
def test_greedy_rows_are_the_same_under_all_rules(seed, with_law):
    laws, sampling, positions, _, tokens, count = random_case(seed)
    with np.errstate(divide="ignore"):
        certain = jnp.asarray(np.log(np.eye(6, dtype=np.float32)[tokens]))
    draft = make_draft(tokens, count, certain if with_law else None)
    one = verify_jitted("coupled", draft, laws, sampling, positions)
    greedy = np.asarray(sampling.temperature) == 0
    for rule in ("rejection", "greedy"):
        other = verify_jitted(rule, draft, laws, sampling, positions)
        np.testing.assert_array_equal(one.num_accepted[greedy], other.num_accepted[greedy])
        np.testing.assert_array_equal(one.bonus_token[greedy], other.bonus_token[greedy])


@pytest.mark.parametrize("with_law", [True, False])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_a_rows_verdict_depends_on_nothing_but_the_row(rule, with_law):
    laws, sampling, positions, _, tokens, count = random_case(11)
    others, _, _, _, _, _ = random_case(12)
    law = others[:, :J] if with_law else None
    case = make_draft(tokens, count, law), laws, sampling
    verdict = verify_jitted(rule, *case, positions)
    again = verify_jitted(rule, *case, positions)
    order = np.random.default_rng(0).permutation(len(count))
    moved = verify_jitted(rule, *jax.tree.map(lambda leaf: leaf[order], (*case, positions)))
    doubled = jax.tree.map(
        lambda leaf: jnp.concatenate([leaf[3:4]] * len(count)), (*case, positions)
    )
    alone = verify_jitted(rule, *doubled)
    for field in ("num_accepted", "bonus_token"):
        values = np.asarray(getattr(verdict, field))
        np.testing.assert_array_equal(values, getattr(again, field))
        np.testing.assert_array_equal(values[order], getattr(moved, field))
        np.testing.assert_array_equal(values[[3] * len(count)], getattr(alone, field))


@pytest.mark.parametrize("with_law", [True, False])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_padding_beyond_the_count_is_never_looked_at(rule, with_law):
    laws, sampling, positions, _, tokens, count = random_case(21)
    law = random_case(22)[0][:, :J] if with_law else None
    beyond = np.arange(J) >= count[:, None]
    garbage_laws = np.array(laws)
    garbage_laws[:, 1:][beyond] = np.log(np.float32(1 / 6))
    verdicts = [
        verify_jitted(
            rule,
            make_draft(some, count, law),
            some_laws,
            sampling,
            positions,
        )
        for some, some_laws in (
            (tokens, laws),
            (np.where(beyond, np.int32(5), tokens), jnp.asarray(garbage_laws)),
        )
    ]
    for one, other in zip(*map(jax.tree.leaves, verdicts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_draft_acceptance_and_bonus_draw_independent_numbers():
    """One stream for two purposes would make an accepted token depend on how it was drafted."""
    sampling = make_sampling(range(NUM_ROWS))
    positions = jnp.ones(NUM_ROWS, jnp.int32)
    flat = jnp.full((NUM_ROWS, 4), -np.log(np.float32(4)))
    purposes = (Purpose.TOKEN, Purpose.DRAFT)

    @jax.jit
    def draw_all():
        uniform = verification._uniforms(sampling, positions[:, None])[:, 0]
        accept = jnp.floor(uniform * 4).astype(jnp.int32)
        return [sample_tokens(flat, sampling, positions, p) for p in purposes] + [accept]

    for one, other in itertools.combinations(map(np.asarray, draw_all()), 2):
        cells = np.bincount(one * 4 + other, minlength=16)
        assert p_value(cells, np.full(16, NUM_ROWS / 16)) > FALSE_ALARM


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_nothing_drafted_gives_the_token_of_a_plain_step(rule):
    """So that a row stays the same where its neighbours' drafts decide about the pass."""
    sampling, positions = make_sampling(range(64)), jnp.arange(64, dtype=jnp.int32)
    laws = jnp.tile(jnp.asarray(np.float32(MARKOV[:2])), (64, 1, 1))
    none = jnp.zeros(64, jnp.int32)
    verdict = verify_jitted(rule, make_draft(none[:, None], none), laws, sampling, positions)
    assert verdict.num_accepted.tolist() == [0] * 64
    own = sample(laws[:, 0], sampling, positions, Purpose.TOKEN)
    assert verdict.bonus_token.tolist() == own.tolist()
