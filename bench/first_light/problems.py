"""Random problems for the attention kernels, and their solutions in float64 on the host.

The solutions share nothing with the kernels or with the XLA reference.
"""

import dataclasses
import zlib

import numpy as np

KV_BLOCK = 128
# Around the blocks of keys, where a count or a mask is easily one off.
EDGES = (1, 2, 63, 64, 65, 126, 127, 128, 129, 254, 255, 256, 257)
TREE_NODES = 64
HIDDEN_VALUE = 1e4  # in values that nobody sees, where they must be finite


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sizes and options of one call.

    `tokens` are a prompt's, a draft's, or a tree's branches; `page_slots` 0 means a dense cache.
    """

    op: str
    batch: int
    tokens: int
    slots: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: str
    causal: bool
    ragged: bool
    page_slots: int
    seed: int

    @property
    def work(self) -> int:
        """Something that grows as the call does."""
        return self.batch * self.kv_heads * self.group * self.tokens * self.slots * self.head_dim

    def __str__(self) -> str:
        pages = f" pages {self.page_slots}" if self.page_slots else ""
        flags = f"{' causal' if self.causal else ''}{' ragged' if self.ragged else ''}{pages}"
        return (
            f"B{self.batch} T{self.tokens} S{self.slots} N{self.kv_heads * self.group} "
            f"K{self.kv_heads} H{self.head_dim} {self.dtype}{flags}"
        )


def problems(op: str, count: int, *, tiny: bool = False) -> list[Problem]:
    """Random problems of an op, the smallest first; always the same ones."""
    rng = np.random.default_rng(zlib.crc32(op.encode()))
    drawn = [_problem(op, rng, index, tiny=tiny) for index in range(count)]
    return sorted(drawn, key=lambda one: one.work)


def _problem(op: str, rng: np.random.Generator, index: int, *, tiny: bool) -> Problem:
    prompt = op == "attention"
    most_slots = 256 if tiny else 4096 if prompt else 8192
    slots = int(np.exp(rng.uniform(np.log(128), np.log(most_slots))))
    if prompt:
        # Near whole blocks more often than not, and now and then anything.
        slots = slots // 128 * 128 + int(rng.choice([-1, 0, 1, int(rng.integers(0, 128))]))
        slots = max(slots, 1)
    else:
        slots = max(KV_BLOCK, slots // KV_BLOCK * KV_BLOCK)
    most_tokens = {"attention": slots, "decode_attention": 1, "verify_attention": 16}
    tokens = int(rng.integers(1, min(most_tokens.get(op, 24), slots) + 1))
    if prompt and not tiny:
        tokens = int(rng.choice([slots, tokens]))
    return Problem(
        op=op,
        batch=1 if tiny else int(rng.integers(1, 5)),
        tokens=min(tokens, 130) if tiny else tokens,
        slots=slots,
        kv_heads=1 if tiny else int(rng.choice([1, 2, 4, 8])),
        group=int(rng.choice([1, 2])) if tiny else int(rng.choice([1, 2, 4, 7, 8])),
        head_dim=64 if tiny else int(rng.choice([64, 128])),
        dtype=str(rng.choice(["bfloat16", "float16"])),
        causal=prompt and bool(rng.integers(0, 2)),
        ragged=bool(rng.integers(0, 3)),
        page_slots=0 if prompt else int(rng.choice([0, 0, 16, 64, 128])),
        seed=index,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Arguments of an op in the order it takes them, and what it should return.

    `arguments` are numpy arrays; floating point ones are float64 and hold what the problem's dtype
    can hold. `lse` is the natural LSE [B N T] (of a tree: over its trunk alone).
    """

    arguments: tuple[np.ndarray | None, ...]
    page_table: np.ndarray | None
    out: np.ndarray
    lse: np.ndarray


def solve(problem: Problem, low: np.dtype) -> Solved:
    """Draw the arrays of a problem in dtype `low`, and compute it."""
    rng = np.random.default_rng([problem.seed, problem.slots, problem.tokens])
    batch, tokens, slots = problem.batch, problem.tokens, problem.slots
    heads, scale = problem.kv_heads * problem.group, problem.head_dim**-0.5

    def normal(*shape: int) -> np.ndarray:
        # Some problems have flat weights, where a key too many or too few changes little but the
        # LSE, and some have sharp ones.
        loudness = (0.3, 1.0, 3.0)[problem.seed % 3]
        drawn = rng.standard_normal(shape, np.float32) * np.float32(loudness)
        return drawn.astype(low).astype(np.float64)

    query = normal(batch, tokens, heads, problem.head_dim)
    keys = normal(batch, problem.kv_heads, slots, problem.head_dim)
    values = normal(batch, problem.kv_heads, slots, problem.head_dim)
    seen, indices = _visible(problem, rng)
    hidden = ~seen.any(axis=1)[:, None, :, None]
    clean_keys, clean_values = np.where(hidden, 0.0, keys), np.where(hidden, 0.0, values)
    keys = np.where(hidden, np.nan, keys)
    values = np.where(hidden, HIDDEN_VALUE, values)
    if problem.page_slots:
        # What lies behind all that is seen has not been written: anything may be in those pages.
        unwritten = ~np.logical_or.accumulate(seen.any(axis=1)[:, ::-1], axis=1)[:, ::-1]
        values = np.where(unwritten[:, None, :, None], np.nan, values)
    own = None
    if problem.op == "tree_attention":
        steps = int(rng.integers(1, 9))
        shape = (batch, problem.kv_heads, steps, tokens, problem.head_dim)
        own = normal(*shape), normal(*shape), int(rng.integers(0, steps))
    out, lse = _attend(query, clean_keys, clean_values, seen, scale, own)
    table = None
    if problem.page_slots:
        keys, values, table = _paged(rng, keys, values, problem.page_slots)
    arguments: tuple[np.ndarray | None, ...]
    if problem.op == "attention":
        arguments = query, keys.swapaxes(1, 2), values.swapaxes(1, 2), *indices
    elif problem.op == "decode_attention":
        arguments, out = (query[:, 0], keys, values, *indices), out[:, 0]
    elif own is not None:
        arguments = query, keys, values, *indices, own[0], own[1], np.array(own[2], np.int32)
    else:
        arguments = query, keys, values, *indices
    return Solved(arguments=arguments, page_table=table, out=out, lse=lse)


def _visible(
    problem: Problem, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[np.ndarray | None, ...]]:
    """Which slots each token sees [B T S], and the op's integer arguments that say so."""
    batch, tokens, slots = problem.batch, problem.tokens, problem.slots
    slot = np.arange(slots)

    def counts(least: int, most: int) -> np.ndarray:
        """A number for each row: near the edges of blocks, or anywhere."""
        edges = [edge for edge in EDGES if least <= edge <= most] or [most]
        drawn = np.where(
            rng.random(batch) < 0.5,
            rng.choice(edges, batch),
            rng.integers(least, most + 1, batch),
        )
        return drawn.astype(np.int32) if problem.ragged else np.full(batch, most, np.int32)

    if problem.op == "attention":
        lengths = counts(0, slots) if problem.ragged else None
        start = counts(0, slots - tokens) if problem.causal and slots > tokens else None
        seen = np.ones((batch, tokens, slots), bool)
        if problem.causal:
            first = np.zeros(batch, np.int32) if start is None else start
            seen &= slot <= (first[:, None] + np.arange(tokens))[..., None]
        if lengths is not None:
            seen &= slot < lengths[:, None, None]
        return seen, (lengths, start)
    if problem.op == "decode_attention":
        lengths = counts(0, slots)
        return (slot < lengths[:, None])[:, None], (lengths,)
    if problem.op == "verify_attention":
        start = counts(0, slots - tokens)
        last = start[:, None] + np.arange(tokens)
        return slot <= last[..., None], (start,)
    if problem.op == "tree_attention":
        lengths = np.stack([counts(0, slots) for _ in range(tokens)], axis=1)
        return slot < lengths[..., None], (lengths,)
    prefix = counts(0, slots - min(slots, TREE_NODES))
    picked = rng.random((batch, tokens, TREE_NODES)) < 0.4
    words = np.packbits(picked, axis=-1, bitorder="little").view(np.uint32)
    node = slot - prefix[:, None, None]
    chosen = np.take_along_axis(
        picked, np.broadcast_to(np.clip(node, 0, TREE_NODES - 1), (batch, tokens, slots)), axis=-1
    )
    return (node < 0) | ((node < TREE_NODES) & chosen), (prefix, words)


def _attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    seen: np.ndarray,
    scale: float,
    own: tuple[np.ndarray, np.ndarray, int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The attended values [B T N H] and the natural LSE of the cache's scores [B N T]."""
    batch, tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # [B K G T H]
    rows = grouped.reshape(batch, kv_heads, -1, head_dim)
    scores = np.matmul(rows, keys.swapaxes(2, 3)) * scale
    scores = scores.reshape(batch, kv_heads, -1, tokens, keys.shape[2])
    scores = np.where(seen[:, None, None], scores, -np.inf)
    with np.errstate(divide="ignore"):
        top = scores.max(-1)
        lse = np.log(np.exp(scores - np.where(np.isneginf(top), 0, top)[..., None]).sum(-1)) + top
    total, of_own = lse, None
    if own is not None:
        own_keys, _, step = own
        of_own = np.einsum("bkgrh,bkjrh->bkgrj", grouped, own_keys[:, :, : step + 1]) * scale
        total = np.logaddexp(lse, np.logaddexp.reduce(of_own, axis=-1))
    base = np.where(np.isneginf(total), 0, total)[..., None]
    weights = np.exp(scores - base).reshape(batch, kv_heads, -1, keys.shape[2])
    out = np.matmul(weights, values).reshape(grouped.shape)
    if own is not None and of_own is not None:
        out = out + np.einsum(
            "bkgrj,bkjrh->bkgrh", np.exp(of_own - base), own[1][:, :, : own[2] + 1]
        )
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, head_dim)
    return out, lse.reshape(batch, heads, tokens)


def _paged(
    rng: np.random.Generator, keys: np.ndarray, values: np.ndarray, page_slots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The caches as pools of pages in random order, some of them nobody's, and their table."""
    batch, kv_heads, slots, head_dim = keys.shape
    per_row, spare = slots // page_slots, 3
    order = rng.permutation(batch * per_row + spare)[: batch * per_row]

    def pool(x: np.ndarray) -> np.ndarray:
        pages = x.reshape(batch, kv_heads, per_row, page_slots, head_dim).swapaxes(1, 2)
        filled = np.full((batch * per_row + spare, *pages.shape[2:]), np.nan)
        filled[order] = pages.reshape(-1, *pages.shape[2:])
        return filled

    return pool(keys), pool(values), order.reshape(batch, -1).astype(np.int32)
