"""Problems with bad numbers in them, and what every implementation must make of them.

A problem is one batch whose rows are the same attention, but for what this module's constants say:
row by row, padding of zeros; padding of NaN keys, and of values NaN (in caches) or the largest that
there are; a NaN in a key; a NaN in a value; and a row for which everything is such padding. The
NaNs sit in the last kv head. `judge` compares the rows with each other, so that nothing else needs
to be right.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference

CLEAN, PADDED, BAD_KEY, BAD_VALUE, BLIND = range(5)
ROWS = 5
KV_HEADS, GROUP, HEAD_DIM = 2, 2, 64
COLUMN = 5  # of the bad value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Arguments of an op, and which of its tokens see the slot with the NaN."""

    op: str
    arrays: tuple
    options: dict
    sees: np.ndarray
    has_blind_row: bool = True

    def reference(self):
        """What the specification makes of it; of a cache as pages, whose values may be NaN."""
        options = dict(self.options)
        if not self.op.startswith("attention"):
            options["page_table"] = jnp.arange(ROWS, dtype=jnp.int32)[:, None]
        return getattr(reference, self.op)(*self.arrays, **options)


def draw(*shape, seed=0):
    """Numbers that are the same in all rows of a batch."""
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return np.broadcast_to(values, (ROWS, *shape)).copy()


def spoiled(dtype, padding, slot, *shape, bad_padding=np.nan):
    """Keys and values [ROWS K S H] in which `padding` [ROWS S] and `slot` are bad."""
    keys, values = draw(KV_HEADS, *shape, seed=1), draw(KV_HEADS, *shape, seed=2)
    padding = np.broadcast_to(padding[:, None], keys.shape[:3])
    keys[padding] = values[padding] = 0
    padding = padding & np.isin(np.arange(ROWS), (PADDED, BLIND))[:, None, None]
    keys[padding] = np.nan
    values[padding] = bad_padding
    keys[BAD_KEY, -1, slot, 0] = np.nan
    values[BAD_VALUE, -1, slot, COLUMN] = np.nan
    return jnp.asarray(keys, dtype), jnp.asarray(values, dtype)


def lengths_of(length):
    """That length for all rows but the blind one."""
    return np.where(np.arange(ROWS) == BLIND, 0, length).astype(np.int32)


def past(lengths, num_slots):
    """[ROWS S]: the slots that nobody sees."""
    return np.arange(num_slots) >= np.asarray(lengths)[:, None]


def scaled(**options):
    """Options with the usual scale."""
    return {"scale": HEAD_DIM**-0.5, **options}


def prompt(dtype="bfloat16", *, tokens=130, slots=300, length=230, start=100, bad=150):
    """A chunk of a prompt with a ragged end; tokens from bad - start on see the bad slot."""
    lengths = lengths_of(length)
    largest = float(jnp.finfo(dtype).max)
    padding = past(lengths, slots)
    key, value = spoiled(dtype, padding, bad, slots, HEAD_DIM, bad_padding=largest)
    query = jnp.asarray(draw(tokens, KV_HEADS * GROUP, HEAD_DIM), dtype)
    first = None if start is None else jnp.full(ROWS, start, jnp.int32)
    arrays = (query, key.swapaxes(1, 2), value.swapaxes(1, 2), jnp.asarray(lengths), first)
    options = scaled(causal=True, soft_cap=None, window=None)
    sees = np.arange(tokens) + (start or 0) >= bad
    return Problem(op="attention", arrays=arrays, options=options, sees=sees)


def gradients(dtype="bfloat16", *, tokens=200, length=150, bad=20):
    """The gradients of a prompt, whose last tokens are padding too."""
    forward = prompt(dtype, tokens=tokens, slots=tokens, length=length, start=None, bad=bad)
    out, lse = forward.reference()
    out_gradient = jnp.asarray(draw(*out.shape[1:], seed=3), dtype)
    arrays = (*forward.arrays, out, lse, out_gradient, None)
    return dataclasses.replace(forward, op="attention_backward", arrays=arrays)


def decode(dtype="bfloat16", *, slots=384, length=300, bad=200):
    """One token."""
    lengths = lengths_of(length)
    cache = spoiled(dtype, past(lengths, slots), bad, slots, HEAD_DIM)
    query = jnp.asarray(draw(KV_HEADS * GROUP, HEAD_DIM), dtype)
    arrays = (query, *cache, jnp.asarray(lengths))
    return Problem(op="decode_attention", arrays=arrays, options=scaled(), sees=np.ones(1, bool))


def verify(dtype="bfloat16", *, tokens=4, slots=384, start=254, bad=255):
    """A few tokens; all but the first see the bad slot. Nobody is blind here."""
    starts = np.full(ROWS, start, np.int32)
    cache = spoiled(dtype, past(starts + tokens, slots), bad, slots, HEAD_DIM)
    query = jnp.asarray(draw(tokens, KV_HEADS * GROUP, HEAD_DIM), dtype)
    return Problem(
        op="verify_attention",
        arrays=(query, *cache, jnp.asarray(starts)),
        options=scaled(),
        sees=np.arange(tokens) + start >= bad,
        has_blind_row=False,
    )


def ancestors(dtype="bfloat16", *, slots=384, prefix=240):
    """A tree 0 - 1 - 3, 0 - 2 of which node 2 is bad, over a prefix; other slots are padding."""
    prefixes = lengths_of(prefix)
    words = np.zeros((ROWS, 4, 2), np.uint32)
    words[:BLIND, :, 0] = [0b1, 0b11, 0b101, 0b1011]
    padding = past(prefixes + np.where(prefixes > 0, 4, 0), slots)
    cache = spoiled(dtype, padding, prefix + 2, slots, HEAD_DIM)
    query = jnp.asarray(draw(4, KV_HEADS * GROUP, HEAD_DIM), dtype)
    return Problem(
        op="ancestor_attention",
        arrays=(query, *cache, jnp.asarray(prefixes), jnp.asarray(words)),
        options=scaled(),
        sees=np.array([False, False, True, False]),
    )


def tree(dtype="bfloat16", *, branches=3, slots=384, steps=3, step=1):
    """Branches of a trunk, of which the first does not see the bad slot; later steps are padding.

    All of them see themselves, so nobody is blind.
    """
    lengths = lengths_of(260)[:, None] - np.array([130, 1, 0])
    lengths = np.maximum(lengths, 0).astype(np.int32)
    trunk = spoiled(dtype, past(lengths.max(1), slots), 200, slots, HEAD_DIM)
    unwritten = np.broadcast_to(np.arange(steps) > step, (ROWS, steps))
    own = spoiled(dtype, unwritten, 0, steps, HEAD_DIM * branches)
    own = [x.reshape(ROWS, KV_HEADS, steps, branches, HEAD_DIM) for x in own]
    # Rows of bad slots have them in the trunk only.
    own = [x.at[BAD_KEY].set(x[CLEAN]).at[BAD_VALUE].set(x[CLEAN]) for x in own]
    query = jnp.asarray(draw(branches, KV_HEADS * GROUP, HEAD_DIM), dtype)
    return Problem(
        op="tree_attention",
        arrays=(query, *trunk, jnp.asarray(lengths), *own, jnp.int32(step)),
        options=scaled(),
        sees=np.array([False, True, True]),
        has_blind_row=False,
    )


PROBLEMS = {
    "attention": prompt,
    "attention_backward": gradients,
    "decode_attention": decode,
    "verify_attention": verify,
    "ancestor_attention": ancestors,
    "tree_attention": tree,
}


def judge(problem, found):
    """What is wrong with the result of an implementation: a list of words, empty if nothing is."""
    if problem.op == "attention_backward":
        return _judge_gradients(problem, found)
    out, lse = found if problem.op == "attention" else (found, None)
    out = np.asarray(out, np.float32).reshape(ROWS, len(problem.sees), -1, HEAD_DIM)
    bad_head = np.arange(out.shape[2]) >= out.shape[2] - GROUP
    hit = problem.sees[:, None] & bad_head  # [T N]
    column = np.arange(HEAD_DIM) == COLUMN
    may = np.broadcast_to(bad_head[:, None] & column, out.shape[1:])
    wrong = {
        "finite without bad numbers": not np.isfinite(out[CLEAN]).all(),
        "what padding holds matters": not np.array_equal(out[PADDED], out[CLEAN]),
        "a bad key is not where it is seen": not _nan_exactly(out, BAD_KEY, hit[..., None]),
        "a bad value is not seen": not np.isnan(out[BAD_VALUE][hit][:, COLUMN]).all(),
        "a bad value spreads": not np.array_equal(
            np.where(may, 0, out[BAD_VALUE]), np.where(may, 0, out[CLEAN])
        ),
    }
    if problem.has_blind_row:
        wrong["a blind row is not zero"] = out[BLIND].any()
    if lse is not None:
        lse = np.asarray(lse).swapaxes(1, 2)  # [ROWS T N]
        wrong |= {
            "what padding holds matters to the LSE": not np.array_equal(lse[PADDED], lse[CLEAN]),
            "the LSE misses a bad key": not _nan_exactly(lse, BAD_KEY, hit),
            "the LSE depends on a value": not np.array_equal(lse[BAD_VALUE], lse[CLEAN]),
            "a blind row's LSE is finite": not np.isneginf(lse[BLIND]).all(),
        }
    return [words for words, is_so in wrong.items() if is_so]


def _nan_exactly(found, row, where):
    """Whether a row is NaN there, and elsewhere what the clean row is."""
    where = np.broadcast_to(where, found[row].shape)
    same = np.where(where, 0, found[row]) == np.where(where, 0, found[CLEAN])
    return bool(np.isnan(found[row][where]).all() and same.all())


def _judge_gradients(problem, found):
    names = ("query", "key", "value")
    of = {name: np.asarray(x, np.float32) for name, x in zip(names, found, strict=True)}
    wrong = {}
    for name, gradient in of.items():
        group = GROUP if name == "query" else 1
        others = gradient[:, :, :-group]  # heads without bad numbers
        wrong |= {
            f"{name}: finite without bad numbers": not np.isfinite(gradient[CLEAN]).all(),
            f"{name}: what padding holds matters": not np.array_equal(
                gradient[PADDED], gradient[CLEAN]
            ),
            f"{name}: a blind row is not zero": gradient[BLIND].any(),
            f"{name}: a NaN reaches other heads": not (
                (others[BAD_KEY] == others[CLEAN]).all()
                and (others[BAD_VALUE] == others[CLEAN]).all()
            ),
        }
    hit = of["query"][:, problem.sees][:, :, -GROUP:]
    wrong["query: a NaN that is seen is lost"] = not (
        np.isnan(hit[BAD_KEY]).all() and np.isnan(hit[BAD_VALUE]).all()
    )
    return [words for words, is_so in wrong.items() if is_so]
