"""The ops on caches as rows with limits and bits, against the specification; and merging parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import reference
from pallas_kernels.combine import combine
from pallas_kernels.decode_rows import kernels
from pallas_kernels.exp2 import LOG2_E

B, T, N, K, S, H, J = 3, 5, 6, 2, 80, 8, 3
SCALE = 0.4


def attend(rows, keys, values, limits, bits, num_visible, page_table, *, scale):
    """The row problem in plain JAX, with slots from num_visible on poisoned."""
    keys, values = (reference.in_slot_order(x, page_table) for x in (keys, values))
    hidden = (jnp.arange(S) >= num_visible[:, None])[:, None, :, None]
    keys, values = (jnp.where(hidden, jnp.float32(1e30), x) for x in (keys, values))
    distance = jnp.arange(S) - limits[..., None]
    visible = distance < 0
    if bits is not None:
        words = jnp.where(distance < 32, bits[..., :1], bits[..., 1:])
        bit = jax.lax.shift_right_logical(words, distance % 32) % 2 != 0
        visible = visible | (distance >= 0) & (distance < 64) & bit
    scores = jnp.einsum("bkmh,bksh->bkms", rows, keys) * jnp.float32(scale)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    safe = jnp.where(lse == -jnp.inf, jnp.float32(0), lse)
    out = jnp.einsum("bkms,bksh->bkmh", jnp.exp(scores - safe[..., None]), values)
    return out, lse * jnp.float32(LOG2_E)


KERNELS = kernels(attend, lambda query, keys, values, page_table: None)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32))


def compare(op, *arrays):
    both = KERNELS[op].run, getattr(reference, op)
    got, expected = jax.jit(lambda *a: [run(*a, scale=SCALE) for run in both])(*arrays)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


CACHE = draw(B, K, S, H), draw(B, K, S, H, seed=1)


def test_decode():
    compare("decode_attention", draw(B, N, H), *CACHE, jnp.array([0, 7, S], jnp.int32))


def test_verify():
    compare("verify_attention", draw(B, T, N, H), *CACHE, jnp.array([0, 7, S - T], jnp.int32))


@pytest.mark.parametrize("prefix", [(0, 7, 16), (S - 3, S - 64, 40)])
def test_ancestors(prefix):
    words = np.random.default_rng(2).integers(0, 1 << 32, (B, T, 2), np.uint32)
    words[0, 0] = 0
    arrays = jnp.array(prefix, jnp.int32), jnp.asarray(words)
    compare("ancestor_attention", draw(B, T, N, H), *CACHE, *arrays)


@pytest.mark.parametrize("step", [0, 2])
def test_tree(step):
    lengths = jnp.asarray(np.random.default_rng(3).integers(1, S + 1, (B, T), np.int32))
    own = draw(B, K, J, T, H, seed=4), draw(B, K, J, T, H, seed=5)
    compare("tree_attention", draw(B, T, N, H), *CACHE, lengths, *own, jnp.int32(step))


def in_pages(cache, page_slots):
    """Pages of all rows in random order, one of them nobody's, and the table of each row's."""
    num_pages = B * S // page_slots
    order = np.random.default_rng(6).permutation(num_pages + 1)[:num_pages].astype(np.int32)
    pages = np.asarray(cache).reshape(B, K, -1, page_slots, H).swapaxes(1, 2)
    pool = np.full((num_pages + 1, K, page_slots, H), np.nan, np.float32)
    pool[order] = pages.reshape(-1, K, page_slots, H)
    return jnp.asarray(pool), jnp.asarray(order.reshape(B, -1))


@pytest.mark.parametrize("page_slots", [1, 16, S])
@pytest.mark.parametrize(
    "op", ["decode_attention", "verify_attention", "ancestor_attention", "tree_attention"]
)
def test_pages_hold_what_a_dense_cache_holds(op, page_slots):
    lengths = jnp.array([3, 7, S - T], jnp.int32)
    words = np.random.default_rng(2).integers(0, 1 << 32, (B, T, 2), np.uint32)
    branches = draw(B, K, J, T, H, seed=4), draw(B, K, J, T, H, seed=5), jnp.int32(1)
    query, others = {
        "decode_attention": (draw(B, N, H), (lengths,)),
        "verify_attention": (draw(B, T, N, H), (lengths,)),
        "ancestor_attention": (draw(B, T, N, H), (lengths, jnp.asarray(words))),
        "tree_attention": (draw(B, T, N, H), (jnp.tile(lengths[:, None], T), *branches)),
    }[op]
    (keys, table), (values, _) = (in_pages(x, page_slots) for x in CACHE)
    dense = getattr(pallas_kernels, op)(query, *CACHE, *others)

    @jax.jit
    def both(table, *arrays):
        by_rows = KERNELS[op].run(*arrays, scale=H**-0.5, page_table=table)
        return getattr(pallas_kernels, op)(*arrays, page_table=table), by_rows

    for paged in both(table, query, keys, values, *others):
        np.testing.assert_allclose(paged, dense, rtol=1e-5, atol=1e-6)


BLOCK_OPS = ["decode_attention", "verify_attention", "ancestor_attention", "tree_attention"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", BLOCK_OPS)
def test_blocks_of_a_16_bit_cache_give_what_the_whole_gives(op, dtype):
    """Empty rows and full ones, NaN where nobody has written, and a batch that changes nothing."""
    slots = 384
    lengths = np.array([0, 130, slots - T], np.int32)
    words = np.random.default_rng(2).integers(0, 1 << 32, (B, T, 2), np.uint32)
    cache = [draw(B, K, slots, H, seed=seed).astype(dtype) for seed in (0, 1)]
    unseen = np.arange(slots) >= lengths[:, None] + 64
    cache = [jnp.where(unseen[:, None, :, None], jnp.asarray(np.nan, dtype), x) for x in cache]
    own = (draw(B, K, J, T, H, seed=4), draw(B, K, J, T, H, seed=5))
    query, others = {
        "decode_attention": (draw(B, N, H), (lengths,)),
        "verify_attention": (draw(B, T, N, H), (lengths,)),
        "ancestor_attention": (draw(B, T, N, H), (lengths, words)),
        "tree_attention": (
            draw(B, T, N, H),
            (np.tile(lengths[:, None], T), *(x.astype(dtype) for x in own), np.int32(1)),
        ),
    }[op]
    arrays = jax.tree.map(jnp.asarray, (query.astype(dtype), *cache, *others))
    finite = (*arrays[:2], jnp.nan_to_num(arrays[2]), *arrays[3:])  # as the reference wants it
    wanted, got = (
        jax.jit(functools.partial(getattr(pallas_kernels, op), implementation=name))(*own)
        for name, own in (("xla", finite), ("xla_blocks", arrays))
    )
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=0.01, atol=0.004
    )
    alone = jax.tree.map(lambda x: x[1:2] if x.ndim else x, arrays)
    one = jax.jit(functools.partial(getattr(pallas_kernels, op), implementation="xla_blocks"))
    np.testing.assert_array_equal(one(*alone)[0], got[1])


def test_a_16_bit_cache_is_not_converted_as_a_whole():
    cache = jax.ShapeDtypeStruct((1, 2, 1024, 64), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((1, 4, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = jax.jit(pallas_kernels.decode_attention).lower(query, cache, cache, lengths)
    assert "f32[1,2,1024,64]" not in compiled.compile().as_text()


def test_merged_parts_are_the_whole():
    """Whatever parts hold that were not computed; a row that no part knows is zero."""
    parts, rows, slots = 4, 6, 5
    scores, values = draw(parts, rows, slots) * 9, draw(parts, slots, H)
    lses = jax.nn.logsumexp(scores, axis=-1)
    outs = jnp.einsum("cms,csh->cmh", jnp.exp(scores - lses[..., None]), values)
    computed = np.random.default_rng(0).random((parts, rows)) < 0.6
    computed[:, 0], computed[0, 1:] = False, True
    outs = jnp.where(computed[..., None], outs, jnp.nan)
    lses = jnp.where(computed, lses, jnp.nan)
    out, lse = jax.jit(combine)(outs, lses * jnp.float32(LOG2_E), jnp.asarray(computed))
    scores, values = np.asarray(scores), np.asarray(values)
    for row in range(1, rows):
        known = np.flatnonzero(computed[:, row])
        all_scores = np.concatenate([scores[c, row] for c in known]).astype(float)
        weights = np.exp(all_scores)
        whole = weights @ np.concatenate([values[c] for c in known]) / weights.sum()
        np.testing.assert_allclose(out[row], whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[row], np.log2(weights.sum()), rtol=1e-5)
    np.testing.assert_array_equal(out[0], 0)
    assert lse[0] == -np.inf
