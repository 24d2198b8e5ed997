import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.drafting.ngram import (
    PROMPT_CHUNK,
    NgramConfig,
    draft_ngram,
    init_ngram,
    learn_prompt,
    update_ngram,
)
from ssd_jax.errors import RequestError

ROWS, SLOTS, WIDTH = 2, 40, 4
KINDS = ("simple", "map", "mod")
GARBAGE = 1  # an id of the alphabet, so that reading beyond a text's end would show
CONFIGS = {
    "simple": NgramConfig(kind="simple", n=2, max_draft=7),
    "map": NgramConfig(kind="map", n=2, max_draft=5),
    "map, two hits": NgramConfig(kind="map", n=1, max_draft=5, min_hits=2),
    "map, n 3": NgramConfig(kind="map", n=3, max_draft=3),
    # Tables so small that contexts collide all the time.
    "mod": NgramConfig(kind="mod", n=2, max_draft=9, table_size=8),
    "mod, at least 3": NgramConfig(kind="mod", n=3, max_draft=6, min_draft=3, table_size=32),
}

init = jax.jit(init_ngram, static_argnums=(0, 1, 2))
learn = jax.jit(learn_prompt, static_argnums=0)
draft = jax.jit(draft_ngram, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="width", donate_argnums=1)
def update(config, state, tokens, known, lengths, *, width=WIDTH):
    return update_ngram(config, state, tokens, known, lengths, width=width)


def padded(texts, slots=SLOTS):
    tokens = np.full((len(texts), slots), GARBAGE, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return tokens, np.array([len(text) for text in texts], np.int32)


def drafts_of(config, state, texts, slots=SLOTS):
    got = draft(config, state, *padded(texts, slots))
    assert got.law is None
    assert got.tokens.dtype == got.count.dtype == jnp.int32
    assert got.tokens.shape == (len(texts), config.max_draft)
    return [
        row[:count].tolist()
        for row, count in zip(np.asarray(got.tokens), np.asarray(got.count), strict=True)
    ]


def continued(text, source, count):
    """`text` copied from `source` on, reading what was copied when its end is reached."""
    text = list(text)
    end = len(text)
    for place in range(source, source + count):
        text.append(text[place])
    return text[end:]


def simple_reference(config, text):
    n = config.context_len
    if len(text) < n:
        return []
    for end in reversed(range(n, len(text))):
        if text[end - n : end] == text[-n:]:
            return continued(text, end, config.max_draft)
    return []


def map_reference(config, text):
    n = config.context_len
    if len(text) < n:
        return []
    places = collections.defaultdict(list)
    for end in range(n, len(text)):
        if text[end - n : end] == text[-n:]:
            places[text[end]].append(end)
    if not places:
        return []
    best = max(places.values(), key=lambda found: (len(found), found[-1]))
    return continued(text, best[-1], config.max_draft) if len(best) >= config.min_hits else []


class ModReference:
    """The pool as a dictionary; the hash from its definition, in whole numbers."""

    def __init__(self, config):
        self.config, self.pool = config, {}

    def entry(self, context):
        last = len(context) - 1
        h = sum(token * 1664525 ** (last - k) for k, token in enumerate(context)) % 2**32
        h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
        h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
        return (h ^ (h >> 16)) % self.config.table_size

    def update(self, texts, known):
        n = self.config.context_len
        for place in range(n, max(map(len, texts))):
            for text, first in zip(texts, known, strict=True):
                if first <= place < len(text):
                    self.pool[self.entry(text[place - n : place])] = text[place]

    def draft(self, text):
        n, drafted = self.config.context_len, list(text)
        while n <= len(text) and len(drafted) < len(text) + self.config.max_draft:
            found = self.pool.get(self.entry(drafted[-n:]))
            if found is None:
                break
            drafted.append(found)
        drafted = drafted[len(text) :]
        return drafted if len(drafted) >= self.config.min_draft else []


REFERENCES = {"simple": simple_reference, "map": map_reference}


@st.composite
def growing_texts(draw):
    """Rows of text over a small alphabet, and their lengths after each update."""
    alphabet = draw(st.integers(1, 4))
    text = st.lists(st.integers(0, alphabet - 1), max_size=SLOTS)
    texts = draw(st.lists(text, min_size=ROWS, max_size=ROWS))
    history = [[0] * ROWS]
    while any(length < len(text) for length, text in zip(history[-1], texts, strict=True)):
        grown = [draw(st.integers(0, WIDTH)) for _ in texts]
        history.append(
            [min(a + b, len(text)) for a, b, text in zip(history[-1], grown, texts, strict=True)]
        )
    return texts, history


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25)
@given(case=growing_texts())
def test_drafts_are_those_of_the_reference_after_every_update(name, case):
    config = CONFIGS[name]
    texts, history = case
    pool = ModReference(config)
    state = init(config, ROWS, SLOTS)
    for before, after in itertools.pairwise(history):
        prefixes = [text[:length] for text, length in zip(texts, after, strict=True)]
        state = update(config, state, *_update_arguments(prefixes, before))
        if config.kind == "mod":
            pool.update(prefixes, before)
            expected = [pool.draft(text) for text in prefixes]
        else:
            expected = [REFERENCES[config.kind](config, text) for text in prefixes]
        assert drafts_of(config, state, prefixes) == expected


def _update_arguments(texts, known):
    tokens, lengths = padded(texts)
    return tokens, np.array(known, np.int32), lengths


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(case=growing_texts())
def test_a_text_learnt_at_once_leaves_the_state_of_any_chunks(kind, case):
    config = CONFIGS[kind]
    texts, history = case
    if kind == "mod":  # rows share a table: the order among them counts, so they grow in step
        longest = max(map(len, texts))
        steps = range(0, longest + WIDTH, WIDTH)
        history = [[min(step, len(text)) for text in texts] for step in steps]
    state = init(config, ROWS, SLOTS)
    for before, after in itertools.pairwise(history):
        prefixes = [text[:length] for text, length in zip(texts, after, strict=True)]
        state = update(config, state, *_update_arguments(prefixes, before))
    at_once = learn(config, init(config, ROWS, SLOTS), *padded(texts))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_many_chunks_are_learnt_to_the_end(kind):
    config = NgramConfig(kind=kind, max_draft=8)
    slots = 3 * PROMPT_CHUNK + 5
    unique = list(range(100, 100 + slots - 10))
    for split in (PROMPT_CHUNK - 1, PROMPT_CHUNK, 2 * PROMPT_CHUNK + 3):
        text = unique + unique[split - config.context_len : split]
        state = learn(config, init(config, 1, slots), *padded([text], slots))
        got = drafts_of(config, state, [text], slots)[0]
        expected = unique[split:][:8]
        assert got[: len(expected)] == expected


@pytest.mark.parametrize("kind", ["simple", "map"])
def test_rows_do_not_learn_from_each_other(kind):
    config = CONFIGS[kind]
    texts = [[1, 2, 3, 0, 1, 2], [5, 6, 7, 1, 2]]
    state = learn(config, init(config, 2, SLOTS), *padded(texts))
    assert drafts_of(config, state, texts) == [[3, 0, 1, 2, 3, 0, 1][: config.max_draft], []]


def test_rows_share_the_pool_of_mod():
    config = NgramConfig(kind="mod", n=2, max_draft=4)
    texts = [[1, 2, 3, 4, 9], [8, 1, 2]]
    state = learn(config, init(config, 2, SLOTS), *padded(texts))
    assert drafts_of(config, state, texts) == [[], [3, 4, 9]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3, 6])
def test_texts_about_as_long_as_a_context(kind, n):
    config = NgramConfig(kind=kind, n=n, max_draft=4, table_size=1024)
    texts = [[7] * length for length in (0, n - 1, n, n + 1)]
    # mod shares what the last row learns; n equal tokens are a context there already.
    alone = [[], [], [], [7] * 4]
    shared = [[], [], [7] * 4, [7] * 4]
    state = learn(config, init(config, 4, SLOTS), *padded(texts))
    assert drafts_of(config, state, texts) == (shared if kind == "mod" else alone)


@pytest.mark.parametrize("kind", KINDS)
def test_longest_drafts_from_a_full_buffer(kind):
    config = NgramConfig(kind=kind, n=3, max_draft=64)
    text = [token % 5 for token in range(SLOTS)]
    state = learn(config, init(config, 1, SLOTS), *padded([text]))
    assert drafts_of(config, state, [text]) == [[token % 5 for token in range(SLOTS, SLOTS + 64)]]


@pytest.mark.parametrize(("min_draft", "count"), [(1, 3), (3, 3), (4, 0)])
def test_short_chains_are_dropped(min_draft, count):
    config = NgramConfig(kind="mod", n=2, max_draft=8, min_draft=min_draft)
    learnt = [[1, 2, 3, 4, 5]]
    state = learn(config, init(config, 1, SLOTS), *padded(learnt))
    assert drafts_of(config, state, [[1, 2]]) == [[3, 4, 5][:count]]


def test_map_prefers_the_frequent_and_then_the_latest_continuation():
    config = NgramConfig(kind="map", n=1, max_draft=1)
    for text, expected in (
        ([1, 2, 1, 2, 1, 3, 1], [2]),
        ([1, 2, 1, 2, 1, 3, 1, 3, 1], [3]),
        ([1, 3, 1, 3, 1, 2, 1, 2, 1], [2]),
    ):
        state = learn(config, init(config, 1, SLOTS), *padded([text]))
        assert drafts_of(config, state, [text]) == [expected]


def test_the_later_position_wins_within_one_update():
    config = NgramConfig(kind="mod", n=1, max_draft=1, table_size=1)  # every context collides
    for text in itertools.permutations((3, 1, 2, 4)):
        state = init(config, 1, SLOTS)
        state = update(config, state, *_update_arguments([list(text)], [0]))
        np.testing.assert_array_equal(state.next_tokens, text[-1:])


@pytest.mark.parametrize("kind", ["simple", "map"])
def test_collisions_lose_drafts_but_never_make_wrong_ones(kind):
    slots = 32
    config = NgramConfig(kind=kind, n=2, max_draft=1)
    rng = np.random.default_rng(0)
    state = init(config, 1, slots)
    # A table for 32 slots that had to hold the contexts of a hundred texts: hopelessly full.
    for _ in range(100):
        text = rng.integers(0, 1000, slots).tolist()
        state = learn(config, state, *padded([text], slots))
    found = 0
    for _ in range(20):
        text = rng.permutation(1000)[: slots - 2].tolist()
        text = [*text, *text[10:12]]
        state = learn(config, state, *padded([text], slots))
        got = drafts_of(config, state, [text], slots)
        assert got in ([[text[12]]], [[]])
        found += got != [[]]
    assert found < 20


@pytest.mark.parametrize("kind", ["simple", "map"])
def test_a_full_text_without_repeats_keeps_nearly_all_contexts(kind):
    slots = 512
    config = NgramConfig(kind=kind, n=2, max_draft=1)
    rng = np.random.default_rng(1)
    text = rng.permutation(4096)[: slots - 1].tolist()
    state = learn(config, init(config, 1, slots), *padded([text], slots))
    # Ask by texts that differ in their last two tokens alone, without learning these.
    asked = [[*text[:-2], *text[at : at + 2]] for at in range(slots - 5)]
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(asked), axis=0), state)
    got = drafts_of(config, many, asked, slots)
    right = sum(draft == [text[at + 2]] for at, draft in enumerate(got))
    assert right >= 0.975 * len(asked)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def grow(config, state, tokens, lengths, rounds):
    """Rounds of a decoder that takes two drafted tokens, or else the token 3."""

    def advance(_, carry):
        state, tokens, lengths = carry
        drafted = draft_ngram(config, state, tokens, lengths)
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32) - lengths[:, None]
        chosen = jnp.where(drafted.count[:, None] >= 2, drafted.tokens[:, :2], 3)
        new = jnp.take_along_axis(chosen, jnp.clip(columns, 0, 1), axis=1)
        tokens = jnp.where((columns >= 0) & (columns < 2), new, tokens)
        longer = jnp.minimum(lengths + 2, tokens.shape[1])
        state = update_ngram(config, state, tokens, lengths, longer, width=WIDTH)
        return state, tokens, longer

    return jax.lax.fori_loop(0, rounds, advance, (state, tokens, lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_serves_all_lengths_inside_a_loop_without_transfers(kind):
    config = CONFIGS[kind]
    programs = grow._cache_size()
    results = []
    for texts, rounds in (([[0, 1, 0], [2]], 3), ([[0, 1] * 9, []], 30), ([[0, 1] * 9, []], 30)):
        tokens, lengths = jax.device_put(padded(texts))
        state = init(config, ROWS, SLOTS)
        state = learn(config, state, tokens, lengths)
        rounds = jax.device_put(np.int32(rounds))
        with jax.transfer_guard("disallow"):
            state, tokens, lengths = grow(config, state, tokens, lengths, rounds)
        results.append((*jax.tree.leaves(state), tokens, lengths))
    assert grow._cache_size() == programs + 1
    np.testing.assert_array_equal(results[1][-1], [SLOTS, SLOTS])
    np.testing.assert_array_equal(results[1][-2][0], [0, 1] * (SLOTS // 2))
    for one, other in zip(results[1], results[2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_writes_its_tables_in_place(kind):
    config = NgramConfig(kind=kind, table_size=1 << 20)
    state = init(config, ROWS, SLOTS)
    program = grow.lower(config, state, *padded([[0], [0]]), np.int32(1)).compile().as_text()
    (shape,) = {"s32[" + ",".join(map(str, leaf.shape)) + "]" for leaf in jax.tree.leaves(state)}
    of_table = [line for line in program.splitlines() if f"= {shape}" in line]
    assert any("scatter(" in line for line in of_table)
    assert not [line for line in of_table if "copy(" in line or "copy-start(" in line]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "suffix"}, "kind"),
        ({"n": 0}, "n "),
        ({"n": 65}, "n "),
        ({"max_draft": 0}, "max_draft"),
        ({"max_draft": 65}, "max_draft"),
        ({"min_draft": 0}, "min_draft"),
        ({"max_draft": 4, "min_draft": 5}, "min_draft"),
        ({"min_hits": 0}, "min_hits"),
        ({"table_size": 0}, "table_size"),
        ({"table_size": 3}, "table_size"),
        ({"table_size": 1 << 31}, "table_size"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, named):
    with pytest.raises(RequestError, match=f"^{named}.*must be .*, got "):
        NgramConfig(**options)
