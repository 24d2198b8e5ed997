"""Slips of the hand in the kernels: each is refused by the case that it names, and how."""

from faults import Slip

SCHEDULE, ROLES = "pallas_kernels.forward_schedule", "pallas_kernels.forward_roles_sm100"
# Plain arithmetic, so that a property test sees them all, and cases of the kernel some of them.
SCHEDULE_EDITS = {
    "causal: a block is whole one slot too early": ("position + 1)", "position + 2)"),
    "causal: the last slot of a tile is forgotten": (
        "start + first_row + self.tile_rows)",
        "start + first_row + self.tile_rows - 1)",
    ),
    "window: a block is whole one slot too early": (
        "position + (TILE_ROWS - self.window)",
        "position + (TILE_ROWS - 1 - self.window)",
    ),
    "window: the first slot is forgotten": ("(self.window - 1), 0)", "(self.window - 2), 0)"),
    "window: a block too many": ("(self.window - 1), 0)", "self.window, 0)"),
    "a block of one slot is forgotten": ("number + (by - 1)", "number + (by - 2)"),
    "a block too many": ("number + (by - 1)", "number + by"),
    "whole blocks are masked": ("position + 1)", "position)"),
    "a tile past the tokens works": (
        "jnp.where(first_row < self.num_tokens, count, 0)",
        "count",
    ),
    "whole blocks past the last": (
        "end = lax.min(lax.max(lax.div(end, self.block_kv) - item.first_block, 0), count)",
        "end = lax.max(lax.div(end, self.block_kv) - item.first_block, 0)",
    ),
    "heads of a group lie apart": (
        "lax.div(head, self.num_heads // self.num_kv_heads)",
        "lax.rem(head, jnp.int32(self.num_kv_heads))",
    ),
    "the second block of a pair takes the rows of the first": ("+ rank * TILE_ROWS", ""),
}
FORWARD = {
    "one normalisation for two items": Slip(
        ROLES,
        [
            ("slot = lax.rem(items, 2)", "slot = lax.rem(items, 1)"),
            ("lax.rem(items[tile], 2)", "lax.rem(items[tile], 1)"),
        ],
        "one block an item",
        {"race", "barrier"},
    ),
    "an accumulator that no item restarts": Slip(
        ROLES,
        [("multiply_values(tile, slot, i > 0)", "multiply_values(tile, slot, blocks + i > 0)")],
        "one block an item",
    ),
    **{
        name: Slip(SCHEDULE, [SCHEDULE_EDITS[name]], case)
        for name, case in {
            "causal: a block is whole one slot too early": "starts at the edges of blocks",
            "causal: the last slot of a tile is forgotten": "starts at the edges of blocks",
            "window: a block is whole one slot too early": "windows at the edges, not causal",
            "window: the first slot is forgotten": "windows at the edges, causal",
        }.items()
    },
    "the scale is always 1 / sqrt(H)": Slip(
        ROLES,
        [
            (
                "(1.0 if self.soft_cap else self.scale)",
                "(1.0 if self.soft_cap else self.head_dim**-0.5)",
            )
        ],
        "rows that see nothing, lengths at the edges of blocks",
    ),
    "masked scores weigh 2**-125": Slip(
        ROLES,
        [("config.is_polynomial(index) and not masked", "config.is_polynomial(index)")],
        "rows past every key beside rows that see some",
    ),
    "lengths are not cut at the slots": Slip(
        "pallas_kernels.forward_sm100",
        [("jnp.clip(length, 0, schedule.num_slots)", "length")],
        "rows past every key beside rows that see some",
    ),
}

TILES = "pallas_kernels.backward_tiles_sm100"
BACKWARD = {
    "dQ: tiles are free before they are read": Slip(
        TILES,
        [
            (
                "wait_tmem_loads(interpret=problem.interpreted)\n"
                "                plgpu.barrier_arrive(memory.tiles_free)",
                "plgpu.barrier_arrive(memory.tiles_free)",
            )
        ],
        "causal_gqa_d64",
        {"race"},
    ),
    "dQ: a tile of one key is forgotten": Slip(
        TILES, [("lax.div(end + (TILE - 1),", "lax.div(end + (TILE - 2),")], "ragged"
    ),
    "dQ: heads of a group lie apart": Slip(
        TILES,
        [
            (
                "kv_head = lax.div(head, jnp.int32(problem.group))",
                "kv_head = lax.rem(head, jnp.int32(problem.num_kv_heads))",
            )
        ],
        "causal_ragged_grouped",
    ),
    "dQ: values are free before their product": Slip(
        TILES,
        [
            ("plgpu.tcgen05_commit_arrive(memory.values_free.at[value_slot])", "pass"),
            (
                "plgpu.barrier_wait(memory.values_full.at[value_slot])",
                "plgpu.barrier_wait(memory.values_full.at[value_slot])\n"
                "                plgpu.tcgen05_commit_arrive(memory.values_free.at[value_slot])",
            ),
        ],
        "ragged",
        {"race"},
    ),
    "dK/dV: scores are free before they are read": Slip(
        TILES,
        [
            (
                "wait_tmem_loads(interpret=problem.interpreted)\n"
                "                plgpu.barrier_arrive(memory.scores_free)",
                "plgpu.barrier_arrive(memory.scores_free)",
            )
        ],
        "in_turns_d64",
        {"race"},
    ),
    "dK/dV: weights are stored while the last are multiplied": Slip(
        TILES,
        [
            ("                store_half(memory.weights, part)\n", ""),
            (
                "                # Full slopes also say",
                "                store_half(memory.weights, part)\n"
                "                # Full slopes also say",
            ),
        ],
        "causal_gqa_d64",
        {"race"},
    ),
    "dK: the scale is always 1 / sqrt(H)": Slip(
        TILES,
        [
            (
                "memory.key_total,\n                    problem.scale",
                "memory.key_total,\n                    problem.head_dim**-0.5",
            )
        ],
        "ragged",
    ),
}

HOPPER_FORWARD_FILE = "pallas_kernels.forward_sm90"
HOPPER_FORWARD = {
    "a block of one key is forgotten": Slip(
        HOPPER_FORWARD_FILE,
        [("lax.div(end + (block_kv - 1),", "lax.div(end + (block_kv - 2),")],
        "ragged",
    ),
    "causal: a block is whole one slot too early": Slip(
        HOPPER_FORWARD_FILE,
        [("jnp.clip(first_position + 1,", "jnp.clip(first_position + 2,")],
        "starts_at_edges",
    ),
    "causal: the last slot of a tile is forgotten": Slip(
        HOPPER_FORWARD_FILE,
        [("jnp.clip(first_position + _BLOCK_Q,", "jnp.clip(first_position + _BLOCK_Q - 1,")],
        "starts_at_edges",
    ),
    "a block is whole one slot too early": Slip(
        HOPPER_FORWARD_FILE,
        [("end, whole = limit, limit\n", "end, whole = limit, limit + 1\n")],
        "ragged",
    ),
    "heads of a group lie apart": Slip(
        HOPPER_FORWARD_FILE,
        [
            (
                "kv_head = lax.div(place.head, jnp.int32(self.group))",
                "kv_head = lax.rem(place.head, jnp.int32(self.num_heads // self.group))",
            )
        ],
        "causal_ragged_grouped",
    ),
    "lengths are not cut at the slots": Slip(
        HOPPER_FORWARD_FILE, [("jnp.clip(lengths, 0, num_slots)", "lengths")], "ragged"
    ),
}

SPLITS = "pallas_kernels.decode_splits"
BLACKWELL, HOPPER = "pallas_kernels.decode_sm100", "pallas_kernels.decode_sm90"
DECODE = {
    "a block of one key is forgotten": Slip(
        SPLITS,
        [
            (
                "lax.div(visible + BLOCK_KV - 1, BLOCK_KV)",
                "lax.div(visible + BLOCK_KV - 2, BLOCK_KV)",
            )
        ],
        "edges",
    ),
    "all see a block one slot too early": Slip(
        SPLITS,
        [("jnp.min(limits, axis=1) // BLOCK_KV", "(jnp.min(limits, axis=1) + 1) // BLOCK_KV")],
        "edges",
    ),
    "masks of the first row": Slip(
        SPLITS, [("numbers_gmem.at[place.row, masks", "numbers_gmem.at[0, masks")], "edges"
    ),
    "pages of the first row": Slip(SPLITS, [("refs[4][place.row,", "refs[4][0,")], "pages"),
    "pages of the first head": Slip(
        SPLITS, [("source.at[page, place.head,", "source.at[page, 0,")], "pages"
    ),
}
DECODE_SM100 = {
    "the last product is awaited only to rescale": Slip(
        BLACKWELL,
        [
            (
                'plgpu.barrier_wait(scratch["out_ready"].at[tile])\n\n'
                "            @pl.when(warp_any(new_top > top, interpret=interpreted))\n"
                "            def _() -> None:\n",
                "@pl.when(warp_any(new_top > top, interpret=interpreted))\n"
                "            def _() -> None:\n"
                '                plgpu.barrier_wait(scratch["out_ready"].at[tile])\n',
            )
        ],
        "edges",
        {"barrier", "race"},
    ),
    "small growth does not rescale": Slip(
        BLACKWELL, [("warp_any(new_top > top,", "warp_any(new_top > top + 1,")], "edges"
    ),
    "the scale is always 1 / sqrt(H)": Slip(
        BLACKWELL, [("jnp.float32(shape.scale *", "jnp.float32(shape.head_dim**-0.5 *")], "edges"
    ),
}
DECODE_SM90 = {
    "values are free before their product": Slip(
        HOPPER,
        [
            ('        plgpu.barrier_arrive(scratch["values_free"].at[slot])\n', ""),
            (
                "        added = product(",
                '        plgpu.barrier_arrive(scratch["values_free"].at[slot])\n'
                "        added = product(",
            ),
        ],
        "edges",
        {"race"},
    ),
    "the sum is not rescaled": Slip(
        HOPPER, [("total = total * factor + weights", "total = total + weights")], "edges"
    ),
}
