"""Cases of the decode kernels: each runs in a process of its own, see `proof/interpret.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from edges import relative_rms
from faults import without

from pallas_kernels import decode_sm90, decode_sm100
from pallas_kernels.decode_splits import DecodeConfig
from pallas_kernels.proof.interpret import params

MODULES = {"sm_90": decode_sm90, "sm_100": decode_sm100}


def naive(rows, keys, values, visible, scale):
    """Attention of rows [B K M H] to the slots visible [B M S], float64."""
    scores = np.einsum("bkmh,bksh->bkms", rows, keys) * scale
    scores = np.where(visible[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bkms,bksh->bkmh", weights, values) / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        return out, (np.log(total) + top)[..., 0] / np.log(2)


def rows_and_limits(
    *,
    num_rows,
    head_dim=128,
    num_slots=512,
    lengths=(512,),
    kv_heads=1,
    factor=6.0,
    scale=None,
    spread=5,
    dtype="bfloat16",
    tiles=1,
    split_blocks=2,
    kv_stages=2,
    with_bits=False,
    page_slots=0,
    spoil=False,
    seed=0,
    kernel="sm_100",
):
    """Errors of the combined splits, and of the LSE, against float64 on the same inputs.

    With `spoil` all that nobody has written, keys and values past the lengths, is NaN. `factor` is
    the loudness of all scores or, as a list, of each row of the batch; the limits of its rows are
    the length and up to `spread` - 1 less.
    """
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    low = jnp.dtype(dtype)
    rows = rng.standard_normal((batch, kv_heads, num_rows, head_dim))
    rows *= np.reshape(factor, (-1, 1, 1, 1))
    keys, values = rng.standard_normal((2, batch, kv_heads, num_slots, head_dim))
    lengths = np.array(lengths, np.int32)
    slot = np.arange(num_slots)
    if with_bits:
        limits = np.repeat(np.maximum(lengths - 64, 0)[:, None], num_rows, 1).astype(np.int32)
        picked = rng.random((batch, num_rows, 64)) < 0.4
        bits = np.packbits(picked, axis=-1, bitorder="little").view(np.int32)
        distance = slot - limits[..., None]
        chosen = np.take_along_axis(picked, np.clip(distance, 0, 63), axis=-1)
        visible = (distance < 0) | ((distance < 64) & chosen)
        visible &= slot < lengths[:, None, None]
    else:
        limits = np.maximum(lengths[:, None] - rng.integers(0, spread, (batch, num_rows)), 0)
        limits = limits.astype(np.int32)
        bits = None
        visible = slot < limits[..., None]
    rows, keys, values = (np.asarray(jnp.asarray(x, low)) for x in (rows, keys, values))
    scale = head_dim**-0.5 if scale is None else scale
    expected, expected_lse = naive(
        *(x.astype(np.float64) for x in (rows, keys, values)), visible, scale
    )
    if spoil:
        unwritten = (slot >= lengths[:, None])[:, None, :, None]
        keys, values = (np.where(unwritten, low.type(np.nan), x) for x in (keys, values))
    table = None
    if page_slots:
        keys, values, table = paged(rng, keys, values, page_slots)
    config = DecodeConfig(tiles=tiles, split_blocks=split_blocks, kv_stages=kv_stages)
    out, lse = MODULES[kernel].attend(
        *(jnp.asarray(x) for x in (rows, keys, values, limits)),
        None if bits is None else jnp.asarray(bits),
        jnp.asarray(lengths),
        None if table is None else jnp.asarray(table),
        scale=scale,
        config=config,
        interpret=params(),
    )
    out, lse = np.asarray(out), np.asarray(lse)
    blind = np.isneginf(expected_lse)
    return {
        "relative_rms": relative_rms(out, expected),
        "lse": float(np.max(np.abs(lse - expected_lse)[~blind])),
        "blind": int(blind.sum()),
        "blind_right": bool(np.all(np.isneginf(lse) == blind) and np.all(out[blind] == 0)),
    }


def wrong(figures, case):
    """Which figures of `rows_and_limits` are not those of a right kernel."""
    limits = {"relative_rms": 3e-3, "lse": 2e-4}
    too_large = [name for name, limit in limits.items() if not figures[name] <= limit]
    some_are_blind = 0 in case.get("lengths", [])
    blind = figures["blind_right"] and (figures["blind"] > 0) == some_are_blind
    return too_large + ([] if blind else ["blind"])


def program(
    *,
    kernel="sm_100",
    op="decode_attention",
    batch=1,
    tokens=1,
    head_dim=128,
    num_slots=8192,
    dtype="bfloat16",
):
    """The kernel inside an op on a cache of 8 kv heads with 4 query heads each, to be compiled."""

    def run(*arrays):
        return MODULES[kernel].KERNELS[op].run(*arrays, scale=head_dim**-0.5)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    query = array(batch, tokens, 32, head_dim)
    cache = array(batch, 8, num_slots, head_dim)
    counts = array(batch, dtype=jnp.int32)
    if op == "decode_attention":
        return run, (array(batch, 32, head_dim), cache, cache, counts)
    if op == "ancestor_attention":
        return run, (query, cache, cache, counts, array(batch, tokens, 2, dtype=jnp.uint32))
    return run, (query, cache, cache, counts)


def paged(rng, keys, values, page_slots):
    """The cache as a shuffled pool of pages, some of them nobody's, and its page table."""
    batch, kv_heads, num_slots, head_dim = keys.shape
    per_row = num_slots // page_slots
    order = rng.permutation(batch * per_row + 3)[: batch * per_row]

    def pool(x):
        pages = x.reshape(batch, kv_heads, per_row, page_slots, head_dim).transpose(0, 2, 1, 3, 4)
        filled = np.full((batch * per_row + 3, *pages.shape[2:]), np.nan, x.dtype)
        filled[order] = pages.reshape(-1, *pages.shape[2:])
        return filled

    return pool(keys), pool(values), order.reshape(batch, per_row).astype(np.int32)


def faulty(*, fault, kernel, **arguments):
    """`rows_and_limits` of a kernel without one piece of its synchronisation."""
    with without(fault, MODULES[kernel], "_block"):
        return rows_and_limits(kernel=kernel, **arguments)
