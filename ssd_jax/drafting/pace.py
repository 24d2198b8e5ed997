"""How many tokens to draft for each row, from measured times and from how its drafts fared lately.

With acceptance a, a draft of k tokens yields 1 + a + ... + a^k tokens in expectation (Leviathan et
al. 2023, equation 1); the best k yields most of them a second. A row's choice depends on its own
past alone, so neighbours do not change it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssd_jax.types import Draft, Pace

PRIOR_ACCEPTANCE = 0.7
PRIOR_WEIGHT = 4.0  # tokens that the prior counts for, until it is forgotten like any other
MEMORY = 0.9  # what a round's counts are worth one round of drafting later
ROUNDS_UNTIL_PROBE = 32  # a drafter that was switched off gets one token to try again


def init_pace(num_drafters: int, batch_size: int) -> Pace:
    """Nothing drafted so far: what is expected of a drafter counts as its past."""
    shape = (num_drafters, batch_size)
    return Pace(
        tried=jnp.full(shape, PRIOR_WEIGHT, jnp.float32),
        accepted=jnp.full(shape, PRIOR_WEIGHT * PRIOR_ACCEPTANCE, jnp.float32),
        idle=jnp.zeros(shape, jnp.int32),
    )


def update_pace(
    pace: Pace, draft: Draft, num_accepted: Int[Array, "B"], running: Bool[Array, "B"]
) -> Pace:
    """The pace with one more round of the running rows."""
    index = jnp.arange(pace.tried.shape[0], dtype=jnp.int32)[:, None]
    drafted = running & (draft.count > 0) & (draft.drafter == index)
    judged = jnp.minimum(num_accepted + 1, draft.count).astype(jnp.float32)
    accepted = num_accepted.astype(jnp.float32)
    return Pace(
        tried=jnp.where(drafted, MEMORY * pace.tried + judged, pace.tried),
        accepted=jnp.where(drafted, MEMORY * pace.accepted + accepted, pace.accepted),
        idle=jnp.where(drafted, 0, pace.idle + running.astype(jnp.int32)),
    )


def draft_limits(pace: Pace, round_s: Float[Array, "P J+1"]) -> Int[Array, "P B"]:
    """Most tokens that each drafter should propose for each row, 0 where it only costs time.

    `round_s[p, k]` is how long a round takes in which drafter p proposes k tokens, 0 being a plain
    step. A drafter that a later one outdoes steps back in that row.
    """
    acceptance = pace.accepted / pace.tried
    lengths = jnp.arange(round_s.shape[1], dtype=jnp.float32)
    tokens = jnp.cumsum(acceptance[..., None] ** lengths, axis=-1)
    rates = tokens / round_s[:, None]
    best = jnp.max(rates, axis=-1)
    later = jnp.stack([jnp.max(best[p:], axis=0) for p in range(best.shape[0])])
    limits = jnp.where(best < later, 0, jnp.argmax(rates, axis=-1))
    probing = (limits == 0) & (pace.idle >= ROUNDS_UNTIL_PROBE)
    return jnp.where(probing, 1, limits).astype(jnp.int32)
