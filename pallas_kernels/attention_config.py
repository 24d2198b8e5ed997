"""How a Blackwell attention kernel is cut up, and what of an SM that takes.

A configuration is fixed when a kernel is traced. It follows from the head dim and the options,
never from the batch or the number of rows, so that a row's result does not depend on its
neighbours.
"""

import dataclasses
from typing import Literal

from pallas_kernels.exp2 import COEFFICIENTS
from pallas_kernels.register_budgets import register_budgets

TILE_ROWS = 128  # rows of the tensor core's accumulator, and of tensor memory
TMEM_COLUMNS = 512  # per SM, 32 bit each
SMEM_BYTES = 227 * 1024  # what one block may have of an SM's shared memory
OUT_COLUMNS = 32  # columns of the output that leave through one staging buffer
# What shared memory holds beside the tiles: row factors, barriers, the tensor memory's address.
SMEM_RESERVE = 1024 + 2048

Overlay = Literal["in_order", "wait", "none"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig:
    """Shape of the sm_100 forward kernel.

    tiles: query tiles of 128 rows a block works on at once, each with a softmax warpgroup.
    block_kv: keys a step; kv_stages: blocks of keys, and of values, that shared memory holds.
    chunk: columns of a score row between which the polynomial and the special function unit are
        chosen; polynomial_chunks of them in a block use the polynomial of polynomial_degree.
    rescale_threshold: the accumulator keeps its scale until a row's maximum grows by more than this
        (base 2); exact in real arithmetic, since the same stale maximum normalises at the end.
    overlay: weights lie on the scores they came from ("in_order": the next scores overwrite them
        while the tensor core still reads, as FlashAttention-4 does, which relies on it executing in
        order; "wait": after waiting for that) or beside them ("none", if tensor memory is enough).
    programs: blocks launched, each of which works on several items in turn.
    out_stages: staging buffers of the output.
    pair: two SMs multiply together, rows of both by keys of which each holds one half; halves what
        an SM loads and stores of keys and values. The interpreter cannot run it.
    registers: per thread of the softmax, the correction and the load/multiply warpgroup (see
        `register_budgets`).
    """

    tiles: int = 2
    block_kv: int = 128
    kv_stages: int = 2
    chunk: int = 32
    polynomial_chunks: int = 1
    polynomial_degree: int = 3
    rescale_threshold: float = 8.0
    overlay: Overlay = "in_order"
    programs: int = 148
    out_stages: int = 2
    registers: tuple[int, int, int] = (184, 80, 64)
    pair: bool = False

    def __post_init__(self) -> None:
        """Refuse what no kernel can be built for.

        Raises:
            ValueError: A field is out of its range.
        """
        if self.tiles not in (1, 2):
            raise ValueError(f"tiles must be 1 or 2, got {self.tiles}.")
        if self.chunk not in (16, 32, 64) or self.block_kv % self.chunk:
            raise ValueError(
                f"chunk must be 16, 32 or 64 and divide block_kv, got {self.chunk} for "
                f"{self.block_kv}."
            )
        if not 0 <= self.polynomial_chunks <= self.num_chunks:
            raise ValueError(
                f"polynomial_chunks must be at most block_kv / chunk = {self.num_chunks}, got "
                f"{self.polynomial_chunks}."
            )
        if self.overlay not in ("in_order", "wait", "none"):
            raise ValueError(f"overlay must be in_order, wait or none, got {self.overlay!r}.")
        if self.pair and self.overlay == "wait":
            raise ValueError('overlay "wait" is for tests of single blocks, not for a pair.')
        if self.polynomial_degree not in COEFFICIENTS:
            raise ValueError(
                f"polynomial_degree must be one of {sorted(COEFFICIENTS)}, got "
                f"{self.polynomial_degree}."
            )
        if self.out_stages not in (1, 2, 4):
            raise ValueError(f"out_stages must be 1, 2 or 4, got {self.out_stages}.")
        for name in ("kv_stages", "programs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.rescale_threshold < 0:
            raise ValueError(
                f"rescale_threshold must not be negative, got {self.rescale_threshold}."
            )
        softmax, correction, other = self.registers
        register_budgets(*[softmax] * self.tiles, correction, other)

    @property
    def num_chunks(self) -> int:
        """Chunks a score row of one block has."""
        return self.block_kv // self.chunk

    @property
    def blocks(self) -> int:
        """Blocks, and SMs, that work together."""
        return 2 if self.pair else 1

    def is_polynomial(self, index: int) -> bool:
        """Whether that chunk of a row uses the polynomial; the last chunk is the last to do so."""
        before_last = (index - (self.num_chunks - 1)) % self.num_chunks
        return before_last >= self.num_chunks - self.polynomial_chunks

    def tmem_columns(self, head_dim: int) -> int:
        """Columns of tensor memory: scores, weights (16 bit, two a column) and accumulators."""
        weights = self.block_kv // 2 if self.overlay == "none" else 0
        return self.tiles * (self.block_kv + weights + head_dim)

    def smem_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Bytes of shared memory: query tiles, blocks of keys and values, output on its way."""
        query = self.tiles * TILE_ROWS * head_dim
        keys_values = 2 * self.kv_stages * self.block_kv * head_dim // self.blocks
        out = self.out_stages * TILE_ROWS * OUT_COLUMNS
        return (query + keys_values + out) * itemsize + SMEM_RESERVE

    def does_not_fit(self, head_dim: int) -> str | None:
        """Why an SM has no room for it, or None."""
        columns, size = self.tmem_columns(head_dim), self.smem_bytes(head_dim)
        if columns > TMEM_COLUMNS:
            return f"needs {columns} columns of tensor memory, and an SM has {TMEM_COLUMNS}"
        if size > SMEM_BYTES:
            return f"needs {size} bytes of shared memory, and a block may have {SMEM_BYTES}"
        return None


def forward_config(
    head_dim: int, *, soft_cap: float | None = None, window: int | None = None
) -> ForwardConfig:
    """The configuration for a head dim of 64, 128, 192 or 256.

    64 has room for weights beside the scores. 192 fits with half the keys a step, 256 with one
    query tile and without prefetching: those run, but their tensor core waits for the softmax.
    With a soft cap and a window together, 128 spills registers unless chunks are small.
    """
    if head_dim <= 64:
        return ForwardConfig(overlay="none", kv_stages=4, out_stages=4)
    if head_dim <= 128 and soft_cap is not None and window is not None:
        return ForwardConfig(chunk=16, polynomial_chunks=2)
    if head_dim <= 128:
        return ForwardConfig()
    if head_dim <= 192:
        return ForwardConfig(block_kv=64)
    return ForwardConfig(tiles=1, kv_stages=1, overlay="none", registers=(232, 144, 128))


def paired(config: ForwardConfig) -> ForwardConfig:
    """The configuration with which two SMs do the same together, and prefetch twice as far."""
    return dataclasses.replace(
        config, pair=True, kv_stages=2 * config.kv_stages, registers=(176, 88, 72)
    )
