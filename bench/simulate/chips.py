"""How long a pass of a model takes on accelerators: a roofline with latencies.

A pass reads the weights and the keys and values once, computes for every row of its input, and
waits for each layer's kernels and for two collectives a layer where the weights are divided.
"""

import dataclasses
import math

from ssd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What one accelerator can do, by its data sheet.

    Attributes:
        bytes_per_s: memory bandwidth.
        flops_per_s: dense bfloat16 operations.
        link_bytes_per_s: to the other chips, one direction.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """What no data sheet says: shares of the peaks that are reached, and times that do not shrink.

    Attributes:
        memory_share: of the memory bandwidth.
        compute_share: of the operations.
        layer_s: kernels of a layer that start one after the other, whatever their work.
        collective_s: one all-reduce of a few rows.
        step_s: launching a pass and reading back what it emitted.
    """

    memory_share: float
    compute_share: float
    layer_s: float
    collective_s: float
    step_s: float

    def __post_init__(self) -> None:
        shares = (self.memory_share, self.compute_share)
        seconds = (self.layer_s, self.collective_s, self.step_s)
        if not all(0 < share <= 1 for share in shares):
            raise RequestError(f"Shares of a peak must be above 0 and at most 1, got {shares}.")
        if not all(0 <= s < math.inf for s in seconds):
            raise RequestError(f"Latencies must be finite and not negative, got {seconds}.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that its speed depends on."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int

    @property
    def weights_read(self) -> int:
        """Weights that a pass reads: all but the embedding table, of which it reads single rows."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return (
            self.layers * (attention + 3 * self.hidden * self.feed_forward)
            + self.vocab * self.hidden
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(name="h100", bytes_per_s=3.35e12, flops_per_s=989e12, link_bytes_per_s=450e9),
        Chip(name="b200", bytes_per_s=8.0e12, flops_per_s=2250e12, link_bytes_per_s=900e9),
    )
}


def _shape(
    name: str, layers: int, hidden: int, heads: tuple[int, int, int], feed_forward: int, vocab: int
) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=heads[2],
        feed_forward=feed_forward,
        vocab=vocab,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        _shape("llama-3.1-405b", 126, 16384, (128, 8, 128), 53248, 128256),
        _shape("llama-3.1-70b", 80, 8192, (64, 8, 128), 28672, 128256),
        _shape("llama-3.1-8b", 32, 4096, (32, 8, 128), 14336, 128256),
        _shape("llama-3.2-1b", 16, 2048, (32, 8, 64), 8192, 128256),
        _shape("qwen3-32b", 64, 5120, (64, 8, 128), 25600, 151936),
        _shape("qwen3-0.6b", 28, 1024, (16, 8, 128), 3072, 151936),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in CHIPS:
        raise RequestError(f"A chip must be one of {', '.join(CHIPS)}, got {name!r}.")
    return CHIPS[name]


def find_shape(name: str) -> ModelShape:
    """The model of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in SHAPES:
        raise RequestError(f"A model must be one of {', '.join(SHAPES)}, got {name!r}.")
    return SHAPES[name]


def pass_s(
    shape: ModelShape,
    chip: Chip,
    latencies: Latencies,
    *,
    chips: int,
    rows: float,
    kv_tokens: float,
) -> float:
    """Seconds of one pass in bfloat16.

    `rows` are the tokens of its input, `kv_tokens` the tokens whose keys and values it reads (all
    sequences together); both may be fractions of what several devices divide.
    """
    read = 2 * shape.weights_read + kv_tokens * shape.kv_bytes_per_token
    reading_s = read / chips / (chip.bytes_per_s * latencies.memory_share)
    computing_s = (
        2 * shape.weights_read * rows / chips / (chip.flops_per_s * latencies.compute_share)
    )
    layer_s = latencies.layer_s
    if chips > 1:
        sent = 2 * (chips - 1) / chips * 2 * shape.hidden * rows
        layer_s += 2 * (latencies.collective_s + sent / chip.link_bytes_per_s)
    return max(reading_s, computing_s) + shape.layers * layer_s + latencies.step_s
