"""One round of three drafted tokens and fan-out 3, 2, 1, 1 after ten tokens, number by number.

The numbers are those of the method's specification. Its branches keep their keys in slots behind
the trunk, step by step; here they have buffers of their own in the same order, so the columns of
its mask are the trunk's slots and then those buffers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ssd_cases import CONFIG, FAIR, begin, draft, naive_draft, target
from tiny_models import prompt_ids

import pallas_kernels
from ssd_jax.decoding.ssd import prepare, propose
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.models import branches
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.types import Draft

K, FAN_OUT, N = 3, (3, 2, 1, 1), 10
PROMPT = prompt_ids(N)
DRAFT = naive_draft(FAIR)
DRAFTED = DRAFT.continuation(PROMPT, K)  # the likeliest tokens, which are no roots
TARGET = dataclasses.replace(target(), tokenizer=None)  # all ids are words
ROWS = 4
DEPTHS = [0, 0, 0, 1, 1, 2, 3]
POSITIONS = [
    [10, 10, 10, 11, 11, 12, 13],
    [11, 11, 11, 12, 12, 13, 14],
    [12, 12, 12, 13, 13, 14, 15],
]
MASK_OF_STEP_1 = """
1000 1000000 1000000
1000 0100000 0100000
1000 0010000 0010000
1100 0001000 0001000
1100 0000100 0000100
1110 0000010 0000010
1111 0000001 0000001
"""


@pytest.fixture(scope="module")
def example():
    """The draft's state while the draft is verified, and what its tree steps saw."""
    options = SSD(
        draft=dataclasses.replace(draft(FAIR), tokenizer=None), draft_len=K, fan_out=FAN_OUT
    )
    params = SamplingParams(max_tokens=60, seed=0)
    _, batch, run = begin(TARGET, options, [PROMPT] * ROWS, params)
    state = dataclasses.replace(
        run.speculator,
        draft=Draft(
            tokens=jnp.asarray([DRAFTED] * ROWS, jnp.int32),
            count=jnp.full(ROWS, K, jnp.int32),
            law=None,
            drafter=jnp.zeros(ROWS, jnp.int32),
        ),
    )
    seen = {"positions": [], "visible": []}
    rope_angles, attend = branches.rope_angles, branches.attend_branches

    def rope(config, positions):
        jax.debug.callback(lambda x: seen["positions"].append(x), positions, ordered=True)
        return rope_angles(config, positions)

    def watch(query, trunk_keys, trunk_values, trunk_lengths, keys, values, step):
        columns = visible(trunk_keys.shape[2], trunk_lengths, step)
        jax.debug.callback(lambda x: seen["visible"].append(x), columns, ordered=True)
        return attend(query, trunk_keys, trunk_values, trunk_lengths, keys, values, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, "rope_angles", rope)
        patch.setattr(branches, "attend_branches", watch)
        watched = jax.jit(prepare.__wrapped__, static_argnums=0)
        state = watched(options.speculator, options.draft.params, batch.sampling, state)
        jax.effects_barrier()
    seen = {name: [np.asarray(each) for each in all_steps] for name, all_steps in seen.items()}
    return options, batch, state, seen


def visible(num_slots, trunk_lengths, step):
    """Which columns [B R S + J * R] branches see: equal scores, and values that name their column.

    A column's share is 1 / (columns seen), or nothing.
    """
    num_branches = trunk_lengths.shape[1]
    columns = num_slots + K * num_branches
    names = jnp.eye(columns, dtype=jnp.float32)
    shape = (ROWS, 1, K, num_branches, columns)
    own = jnp.broadcast_to(names[num_slots:].reshape(shape[2:]), shape)
    trunk = jnp.broadcast_to(names[:num_slots], (ROWS, 1, num_slots, columns))
    query = jnp.zeros((ROWS, num_branches, 1, columns), jnp.float32)
    shares = pallas_kernels.tree_attention(query, trunk, trunk, trunk_lengths, own, own, step)
    return shares[:, :, 0] > 0


def roots(logits):
    """The best tokens of each row of logits but the drafted one."""
    found = []
    for j, guesses in enumerate(FAN_OUT):
        ranked = np.argsort(-logits[j], kind="stable").tolist()
        if j < K:
            ranked.remove(DRAFTED[j])
        found += ranked[:guesses]
    return found


def test_depths_and_roots(example):
    state = example[2]
    expected = roots(DRAFT.logits([*PROMPT, *DRAFTED])[N - 1 :])
    for row in range(ROWS):
        assert state.prepared.num_accepted[row].tolist() == DEPTHS
        assert state.prepared.bonus_token[row].tolist() == expected


def test_positions_of_every_step(example):
    seen = example[3]["positions"]
    assert len(seen) == K
    for step, positions in enumerate(seen):
        assert positions.tolist() == [POSITIONS[step]] * ROWS


def test_visible_keys_of_every_step(example):
    seen = example[3]["visible"]
    assert len(seen) == K * CONFIG.num_layers
    masks = [np.concatenate([each[:, :, :13], each[:, :, -K * 7 :]], axis=-1) for each in seen]
    for each in seen:
        assert not each[:, :, 13 : -K * 7].any()  # slots past the draft are no text
    for step, mask in enumerate(masks):
        np.testing.assert_array_equal(mask.sum(axis=-1), np.array([POSITIONS[step]] * ROWS) + 1)
        assert mask[:, :, :9].all()
    rows = [line.replace(" ", "") for line in MASK_OF_STEP_1.split("\n") if line]
    expected = np.array([[letter == "1" for letter in row] for row in rows])
    for row in range(ROWS):
        np.testing.assert_array_equal(masks[1][row, :, 9:27], expected)
    for step in range(K):  # the last mask, cut to what an earlier step has, is that step's
        width = 13 + 7 * (step + 1)
        np.testing.assert_array_equal(masks[2][:, :, :width], masks[step][:, :, :width])


def test_outcomes_of_the_verification(example):
    """A hit, a hit after the whole draft, a miss, and a right token at the wrong depth."""
    options, batch, state, _ = example
    prepared = jax.device_get(state.prepared)
    bonus = prepared.bonus_token[0].tolist()
    other = next(token for token in range(48) if token not in bonus)
    outcomes = [(1, bonus[4]), (3, bonus[6]), (0, other), (2, bonus[4])]
    assert outcomes[3] != (2, bonus[5])
    after, message, _ = propose(
        options.speculator,
        options.draft.params,
        batch.sampling,
        state,
        jnp.asarray([[*outcome, 0] for outcome in outcomes], jnp.int32),
    )
    message, text = np.asarray(message), jax.device_get(after.text)
    assert text.lengths.tolist() == [12, 14, 11, 13]
    for row, (num_accepted, token) in enumerate(outcomes):
        length = text.lengths[row]
        assert text.tokens[row, :length].tolist() == [*PROMPT, *DRAFTED[:num_accepted], token]
    assert message[:, -1].tolist() == [1, 1, 0, 0]
    assert message[:, -2].tolist() == [K] * ROWS
    assert message[0, :K].tolist() == prepared.tokens[0, 4].tolist()
    assert message[1, :K].tolist() == prepared.tokens[1, 6].tolist()
