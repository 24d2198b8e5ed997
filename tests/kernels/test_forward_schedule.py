import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.forward_schedule import Schedule


@st.composite
def schedules(draw):
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Schedule(
        batch=draw(st.integers(1, 3)),
        num_tokens=draw(st.integers(1, 700)),
        num_slots=draw(st.integers(1, 900)),
        num_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        head_bytes=draw(st.sampled_from([256, 20_000])),
        tiles=draw(st.sampled_from([1, 2])),
        blocks=draw(st.sampled_from([1, 2])),
        block_kv=draw(st.sampled_from([64, 128])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 400)),
        has_bounds=True,
    )


def items(schedule, start, length):
    bounds = jnp.asarray(np.stack([start, length], axis=1), jnp.int32)

    def numbers(index):
        item = schedule.item(index, bounds)
        parts = [
            (item.num_blocks[tile], first_row, *schedule.unmasked(item, tile, first_row))
            for tile in range(schedule.tiles)
            for rank in range(schedule.blocks)
            for first_row in [schedule.first_row(item, tile, jnp.int32(rank))]
        ]
        return {**dataclasses.asdict(item), "parts": parts}

    indices = jnp.arange(schedule.num_items, dtype=jnp.int32)
    return jax.tree.map(np.asarray, jax.vmap(numbers)(indices))


@hypothesis.settings(max_examples=15)
@hypothesis.given(schedules(), st.data())
def test_items_cover_every_row_once_and_exactly_the_blocks_it_sees(schedule, data):
    draw = data.draw
    start = [draw(st.integers(0, 300)) for _ in range(schedule.batch)]
    length = [draw(st.integers(0, schedule.num_slots)) for _ in range(schedule.batch)]
    all_items = items(schedule, start, length)
    where = zip(all_items["batch"], all_items["head"], all_items["row"], strict=True)
    assert len(set(where)) == schedule.num_items
    assert set(all_items["head"]) == set(range(schedule.num_heads))
    assert (all_items["kv_head"] == all_items["head"] * schedule.num_kv_heads
            // schedule.num_heads).all()  # fmt: skip
    slots, rows_seen = np.arange(schedule.num_slots), []
    for i in range(schedule.num_items):
        batch = all_items["batch"][i]
        for count, first_row, begin, end in all_items["parts"]:
            count, begin, end = count[i], begin[i], end[i]
            row = first_row[i] + np.arange(128)
            rows_seen.append((batch, all_items["head"][i], row[0]))
            position = start[batch] + row[:, None]
            visible = np.broadcast_to(slots < length[batch], (128, schedule.num_slots)).copy()
            if schedule.causal:
                visible &= slots <= position
            if schedule.window is not None:
                visible &= slots > position - schedule.window
            first = all_items["first_block"][i]
            if row[0] >= schedule.num_tokens:
                continue
            assert 0 <= begin <= end <= count
            worked = slice(first * schedule.block_kv, (first + count) * schedule.block_kv)
            assert not np.delete(visible, np.arange(schedule.num_slots)[worked], axis=1).any()
            whole = slice((first + begin) * schedule.block_kv, (first + end) * schedule.block_kv)
            assert visible[:, whole].all()
            assert whole.start == whole.stop or whole.stop <= schedule.num_slots
    wanted = schedule.batch * schedule.num_heads * schedule.num_row_blocks * schedule.rows // 128
    assert len(set(rows_seen)) == len(rows_seen) == wanted


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
