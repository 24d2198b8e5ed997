"""What a batch takes on each device: what its states hold, and what its programs make meanwhile.

States are measured, by the shapes of what makes them. What a program makes meanwhile only its
compilation would tell, which is too late to refuse anything; it is reckoned from what dominates it,
and `tests/unit/test_memory.py` compares with what XLA plans.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ssd_jax.buckets import PREFILL_CHUNK
from ssd_jax.config import ModelConfig
from ssd_jax.decoding.state import initial_state
from ssd_jax.drafting.ngram import NgramConfig, init_ngram
from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.memory import format_bytes, require_memory
from ssd_jax.model import Model
from ssd_jax.models.branches import init_branches
from ssd_jax.placement import BRANCH_AXIS, MODEL_AXIS
from ssd_jax.speculation_cache import no_prepared_drafts

CACHE, TEXTS, LAWS, TABLES = "key/value caches", "texts and options", "drafts", "n-gram tables"
READING, ROUND = "reading the prompts", "a round of decoding"

# Per position whose token is chosen: logits, counts, warped and sorted laws, noise (float32 each).
_LAWS_A_POSITION = 9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The sizes of a batch, as its arrays have them."""

    num_rows: int
    num_slots: int
    num_top_logprobs: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes on a device: `held` all the time, and what is made while reading or in a round."""

    held: Counter[str]
    reading: int
    decoding: int

    @property
    def parts(self) -> Counter[str]:
        """Bytes by what takes them at the worst moment."""
        if self.reading > self.decoding:
            return self.held + Counter({READING: self.reading})
        return self.held + Counter({ROUND: self.decoding})

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.parts.values())

    def beside(self, other: "Need") -> "Need":
        """Both on one device: prompts are read in turn, rounds may overlap."""
        return Need(
            held=self.held + other.held,
            reading=max(self.reading, other.reading),
            decoding=self.decoding + other.decoding,
        )


def batch_needs(
    model: Model, shape: BatchShape, speculation: Speculation | SSD | None
) -> dict[jax.Device, Need]:
    """What decoding a batch takes besides the weights, by device.

    What is spread over the devices of a model counts in parts, what is whole on each on each.
    """
    needs = [(model, _target_need(model, shape, speculation))]
    if speculation is not None and speculation.draft is not None:
        needs.append((speculation.draft, _draft_need(model, shape, speculation)))
    tables = speculation.own_ngram if isinstance(speculation, SSD) else None
    if isinstance(speculation, Speculation):
        tables = speculation.ngram
    if tables is not None:
        size = _table_bytes(tables, shape.num_rows, shape.num_slots)
        place = speculation.draft if isinstance(speculation, SSD) else model
        needs.append((place, Need(held=Counter({TABLES: size}), reading=0, decoding=0)))
    total: dict[jax.Device, Need] = {}
    for one, need in needs:
        for device in one.params.embedding.devices():
            total[device] = total[device].beside(need) if device in total else need
    return total


def require_batch(model: Model, shape: BatchShape, speculation: Speculation | SSD | None) -> None:
    """Refuse a batch that does not fit.

    Devices of a CPU all take from the machine's memory.

    Raises:
        MemoryBudgetError: what is needed, by what, how much there is, and what to do.
    """
    needs = batch_needs(model, shape, speculation)
    pools: dict[str, tuple[jax.Device, Need]] = {}
    for device, need in needs.items():
        pool = "cpu" if device.platform == "cpu" else str(device)
        _, sharing = pools.get(pool, (device, Need(held=Counter(), reading=0, decoding=0)))
        both = Need(
            held=sharing.held + need.held,
            reading=sharing.reading + need.reading,
            decoding=sharing.decoding + need.decoding,
        )
        pools[pool] = device, both
    for device, need in pools.values():
        parts = ", ".join(
            f"{format_bytes(size)} for {name}" for name, size in need.parts.most_common(3)
        )
        require_memory(
            f"A batch of {shape.num_rows} rows with {shape.num_slots} tokens each",
            need.total,
            device,
            f"{_advice(speculation)}.",
            parts,
        )


def _advice(speculation: Speculation | SSD | None) -> str:
    advice = "lower max_tokens, shorten the prompts, or send fewer at a time"
    if isinstance(speculation, SSD):
        return f"lower fan_out or draft_len, take verification coupled, {advice}"
    if speculation is not None:
        return f"lower draft_len, {advice}"
    return advice


def _target_need(model: Model, shape: BatchShape, speculation: Speculation | SSD | None) -> Need:
    """What the target takes on each of its devices."""
    law = _law_bytes(model, shape)
    width = 1 if speculation is None else speculation.longest_draft + 1
    held = _held(model, model, shape)
    held[TEXTS] += 3 * shape.num_rows * shape.num_slots  # statistics of rounds
    if isinstance(speculation, SSD) and _has_law(speculation):
        held[LAWS] += speculation.draft_len * law  # the draft's, sent along
    return Need(
        held=held,
        reading=_reading_bytes(model, shape),
        decoding=_pass_bytes(model, shape, width) + _LAWS_A_POSITION * width * law,
    )


def _draft_need(model: Model, shape: BatchShape, speculation: Speculation | SSD) -> Need:
    """What the draft model takes on each of its devices."""
    draft = speculation.draft
    if draft is None:
        raise TypeError("There is no draft model.")
    law, reading = _law_bytes(model, shape), _reading_bytes(draft, shape)
    own_law = speculation.draft_len * law if _has_law(speculation) else 0
    drafting = _pass_bytes(draft, shape, 2) + _LAWS_A_POSITION * law + own_law
    held = _held(model, draft, shape)
    if not isinstance(speculation, SSD):  # of its state only the cache stays
        reading += sum(held.values()) - held[CACHE]
        return Need(held=Counter({CACHE: held[CACHE]}), reading=reading, decoding=drafting)
    branches = speculation.speculator.num_branches
    share = -(-branches // _devices_on(draft, BRANCH_AXIS))
    rows, draft_len = shape.num_rows, speculation.draft_len
    vocab_size, with_law = model.config.vocab_size, own_law > 0
    prepared = _prepared_bytes(rows, branches, draft_len, vocab_size, with_law)
    dtype = draft.params.embedding.dtype.name
    cache = _branch_bytes(draft.config, rows, draft_len, share, dtype)
    held[LAWS] += prepared + own_law
    held[TEXTS] += 4 * shape.num_rows * shape.num_slots  # statistics of lookups
    width = max(share, speculation.draft_len + 1)
    positions = (_LAWS_A_POSITION + 1) * share + speculation.draft_len + 1
    preparing = prepared + cache + _pass_bytes(draft, shape, width) + positions * law
    return Need(held=held, reading=reading, decoding=max(preparing, drafting + own_law))


def _has_law(speculation: Speculation | SSD) -> bool:
    """Whether the draft comes with the law that it was drawn from."""
    return speculation.verification == "rejection"


def _law_bytes(model: Model, shape: BatchShape) -> int:
    """One float32 for each token of the vocabulary, in each row."""
    return 4 * shape.num_rows * model.config.vocab_size


def _held(target: Model, model: Model, shape: BatchShape) -> Counter[str]:
    """A model's state with the options of its rows."""
    state = _state_bytes(
        model.config,
        shape.num_rows,
        shape.num_slots,
        model.params.embedding.dtype.name,
        shape.num_top_logprobs,
    )
    options = shape.num_rows * target.config.vocab_size * (4 + 1)  # bias, prompt mask
    cache = state[CACHE] // _devices_on(model, MODEL_AXIS)
    return Counter({CACHE: cache, TEXTS: state[TEXTS] + options})


def _reading_bytes(model: Model, shape: BatchShape) -> int:
    return _pass_bytes(model, shape, min(PREFILL_CHUNK, shape.num_slots))


def _pass_bytes(model: Model, shape: BatchShape, width: int) -> int:
    """Scores and their exponentials, and activations, of a pass of `width` tokens a row."""
    config = model.config
    heads = config.num_heads + 2 * config.num_kv_heads
    token = 4 * config.hidden_size + 3 * config.intermediate_size + 2 * heads * config.head_dim
    scores = 2 * config.num_heads * shape.num_slots // _devices_on(model, MODEL_AXIS)
    return 4 * shape.num_rows * width * (scores + token)


@functools.lru_cache(maxsize=256)
def _state_bytes(
    config: ModelConfig, rows: int, slots: int, dtype: str, num_top_logprobs: int | None
) -> Mapping[str, int]:
    """What a decoding's state holds."""
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    state = jax.eval_shape(
        functools.partial(
            initial_state, config, dtype=jnp.dtype(dtype), num_top_logprobs=num_top_logprobs
        ),
        jax.ShapeDtypeStruct((rows, slots), jnp.int32),
        row,
        row,
    )
    cache = _tree_bytes(state.cache)
    return {CACHE: cache, TEXTS: _tree_bytes(state) - cache}


@functools.lru_cache(maxsize=256)
def _prepared_bytes(
    rows: int, branches: int, draft_len: int, vocab_size: int, with_law: bool
) -> int:
    """What the speculation cache holds."""
    make = functools.partial(
        no_prepared_drafts, rows, branches, draft_len, vocab_size, with_law=with_law
    )
    return _tree_bytes(jax.eval_shape(make))


@functools.lru_cache(maxsize=256)
def _branch_bytes(config: ModelConfig, rows: int, draft_len: int, share: int, dtype: str) -> int:
    """What the branches of a tree hold on one device."""
    make = functools.partial(init_branches, config, rows, draft_len, share, jnp.dtype(dtype))
    return _tree_bytes(jax.eval_shape(make))


@functools.lru_cache(maxsize=256)
def _table_bytes(config: NgramConfig, rows: int, slots: int) -> int:
    return _tree_bytes(jax.eval_shape(functools.partial(init_ngram, config, rows, slots)))


def _tree_bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _devices_on(model: Model, axis: str) -> int:
    """Over how many devices a model's weights or branches are divided along an axis."""
    mesh = getattr(model.params.embedding.sharding, "mesh", None)
    return mesh.shape.get(axis, 1) if mesh is not None else 1
