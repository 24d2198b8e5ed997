"""Which blocks of keys the Blackwell forward works on, by plain arithmetic on intervals."""

import sys
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from edited_cases import edited
from slips import SCHEDULE, SCHEDULE_EDITS

from pallas_kernels.attention_config import TILE_ROWS
from pallas_kernels.forward_schedule import Schedule

FEW_SHAPES = 32  # so many items are computed at once, or a multiple of it, to compile little


def beside_multiple(random, of, most):
    """A number from 0 to about `most`, usually within 2 of a multiple of `of`."""
    if random.random() < 0.2:
        return random.randint(0, most)
    return max(0, random.randint(0, most // of) * of + random.randint(-2, 2))


@st.composite
def calls(draw):
    """Arguments of a `Schedule`, and the start and the length of each row of the batch.

    The numbers come from a plain generator: hypothesis likes to repeat numbers, and few are beside
    a multiple.
    """
    group, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (3, 1)]))
    batch, block_kv = 8 // (group * kv_heads), draw(st.sampled_from([64, 128]))
    windowed, random = draw(st.booleans()), draw(st.randoms(use_true_random=True))
    slots = 1 + beside_multiple(random, block_kv, 600)
    arguments = {
        "batch": batch,
        "num_tokens": 1 + beside_multiple(random, TILE_ROWS, 400),
        "num_slots": slots,
        "num_heads": group * kv_heads,
        "num_kv_heads": kv_heads,
        "head_bytes": draw(st.sampled_from([256, 60_000])),
        "tiles": draw(st.sampled_from([1, 2])),
        "blocks": draw(st.sampled_from([1, 2])),
        "block_kv": block_kv,
        "causal": draw(st.booleans()),
        "window": 1 + beside_multiple(random, block_kv, 400) if windowed else None,
        "has_bounds": True,
    }
    start = [beside_multiple(random, block_kv, 400) for _ in range(batch)]
    length = [min(beside_multiple(random, block_kv, 700), slots) for _ in range(batch)]
    return arguments, start, length


def items(schedule, start, length):
    """Numbers of all items; of their parts tile, first row, begin and end of whole blocks."""
    bounds = jnp.asarray(np.stack([start, length], axis=1), jnp.int32)
    indices = np.arange(-(-schedule.num_items // FEW_SHAPES) * FEW_SHAPES, dtype=np.int32)
    item = schedule.item(jnp.asarray(indices), bounds)

    def cut(numbers):
        return np.broadcast_to(np.asarray(numbers), indices.shape)[: schedule.num_items]

    parts = []
    for tile in range(schedule.tiles):
        for rank in range(schedule.blocks):
            first_row = schedule.first_row(item, tile, jnp.int32(rank))
            parts.append((tile, *map(cut, (first_row, *schedule.unmasked(item, tile, first_row)))))
    names = ("batch", "head", "kv_head", "row", "first_block", "most_blocks")
    numbers = {name: cut(getattr(item, name)) for name in names}
    return numbers | {"num_blocks": [cut(x) for x in item.num_blocks], "parts": parts}


def check(schedule, start, length):
    """Each row is in one item, which works on the key blocks that its rows see and no others."""
    item = items(schedule, start, length)
    names = ("batch", "head", "row")
    assert set(zip(*(item[name].tolist() for name in names), strict=True)) == {
        (batch, head, row)
        for batch in range(schedule.batch)
        for head in range(schedule.num_heads)
        for row in range(0, schedule.num_tokens, schedule.rows)
    }
    assert (item["kv_head"] == item["head"] * schedule.num_kv_heads // schedule.num_heads).all()

    start, length = (np.asarray(x)[item["batch"], None] for x in (start, length))
    block = np.arange(1 + -(-schedule.num_slots // schedule.block_kv))
    left, right = block * schedule.block_kv, (block + 1) * schedule.block_kv
    place = block - item["first_block"][:, None]  # of a block among those of an item
    covered, seen_by_tile = [], np.zeros((schedule.tiles, *place.shape), bool)
    for tile, first_row, begin, end in item["parts"]:
        count = item["num_blocks"][tile]
        assert ((begin >= 0) & (begin <= end) & (end <= count)).all()
        row = first_row[:, None] + np.arange(TILE_ROWS)
        covered.append(row)
        # A row sees the slots low .. high - 1.
        position = start + row
        low, high = np.zeros_like(position), np.broadcast_to(length, position.shape)
        if schedule.causal:
            high = np.minimum(high, position + 1)
        if schedule.window is not None:
            low = np.maximum(position - schedule.window + 1, 0)
        low, high = low[..., None], high[..., None]
        seen = np.maximum(low, left) < np.minimum(high, right)  # [item, row, block]
        whole = ((low <= left) & (right <= high)).all(axis=1)
        worked = (place >= 0) & (place < count[:, None])
        real = item["row"] + tile * schedule.tile_rows < schedule.num_tokens
        assert (count[~real] == 0).all()
        assert (worked | ~seen.any(axis=1))[real].all()
        unmasked = (begin[:, None] <= place) & (place < end[:, None])
        assert (unmasked == (whole & worked)).all()
        seen_by_tile[tile] |= seen.any(axis=1) & real[:, None]
    of_item = (place >= 0) & (place < item["most_blocks"][:, None])
    somebody_sees = seen_by_tile.any(axis=(0, 2))
    assert (of_item == seen_by_tile.any(axis=0))[somebody_sees].all()
    if schedule.window is None:
        assert (np.stack(item["num_blocks"]) == seen_by_tile.sum(axis=2)).all()
    rows = np.sort(np.concatenate(covered, axis=1), axis=1)
    assert (rows == item["row"][:, None] + np.arange(schedule.rows)).all()


@hypothesis.settings(max_examples=250)
@hypothesis.given(calls())
def test_items_cover_every_row_once_and_exactly_the_blocks_it_sees(call):
    arguments, start, length = call
    check(Schedule(**arguments), start, length)


@pytest.mark.parametrize("slip", SCHEDULE_EDITS)
def test_a_slip_in_the_schedule_is_detected(slip):
    with mock.patch.dict(sys.modules):
        faulty = edited(SCHEDULE, [SCHEDULE_EDITS[slip]]).Schedule

    @hypothesis.settings(max_examples=250, phases=[hypothesis.Phase.generate])
    @hypothesis.given(calls())
    def run(call):
        arguments, start, length = call
        check(faulty(**arguments), start, length)

    with pytest.raises(AssertionError):
        run()


@pytest.mark.parametrize("causal", [False, True])
def test_the_heaviest_items_of_heads_that_share_l2_come_first(causal):
    schedule = Schedule(
        batch=1,
        num_tokens=4096,
        num_slots=4096,
        num_heads=8,
        num_kv_heads=4,
        head_bytes=256,
        tiles=2,
        blocks=1,
        block_kv=128,
        causal=causal,
        window=None,
        has_bounds=True,
    )
    assert schedule.heads_at_once == 8
    sizes = items(schedule, [0], [4096])["num_blocks"][-1]
    assert (np.diff(sizes) <= 0).all()
