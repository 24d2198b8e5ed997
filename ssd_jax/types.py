"""The pytrees that programs take and return, and the letters their shapes are written in.

Axis letters, as in `jax.nn.dot_product_attention`, the same in every file:

| letter | axis                          | letter | axis                               |
| ------ | ----------------------------- | ------ | ---------------------------------- |
| B      | batch row                     | D      | model (hidden) dimension           |
| T      | query tokens of one call      | F      | feed-forward dimension             |
| S      | key/value slots               | V      | vocabulary                         |
| N      | query heads                   | L      | layers                             |
| K      | key/value heads               | J      | draft_len (drafted tokens)         |
| G      | N / K, queries per kv head    | R      | branches (the fan-out's sum)       |
| H      | head dimension                | E      | end-of-sequence ids, padded by -1  |
| P      | drafters (proposers)          |        |                                    |

Donated trees (`KVCache`, `DecodeState`) hold buffers and nothing else.
"""

from typing import Final

from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int8, PyTree, UInt32

NO_TOKEN: Final = -1  # the token of a law that has none, since its logits were not finite


@struct.dataclass
class LayerParams:
    """Weights of one decoder layer; the fused projections keep heads grouped by their kv head.

    `qkv[:, k]` holds the G query heads of kv head k, then its key, then its value: one matrix
    product instead of three, and a mesh splits it along K without tearing a group apart.
    """

    attention_norm: Float[Array, "D"]
    qkv: Float[Array, "D K G+2 H"]
    qkv_bias: Float[Array, "K G+2 H"] | None
    query_norm: Float[Array, "H"] | None
    key_norm: Float[Array, "H"] | None
    output: Float[Array, "K G H D"]
    output_bias: Float[Array, "D"] | None
    mlp_norm: Float[Array, "D"]
    gate_up: Float[Array, "D 2 F"]
    gate_up_bias: Float[Array, "2 F"] | None
    down: Float[Array, "F D"]
    down_bias: Float[Array, "D"] | None


@struct.dataclass
class ModelParams:
    """Weights of a whole model; `lm_head` is None when the embedding serves as the output too."""

    embedding: Float[Array, "V D"]
    layers: tuple[LayerParams, ...]
    final_norm: Float[Array, "D"]
    lm_head: Float[Array, "D V"] | None


@struct.dataclass
class KVCache:
    """Keys and values of every layer; row b is valid in slots 0 .. lengths[b] - 1.

    Whatever lies at or beyond a row's length is garbage that a later write replaces.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    lengths: Int[Array, "B"]


@struct.dataclass
class BranchCache:
    """Keys and values that each branch of a tree added to its trunk's, one step after the other."""

    keys: tuple[Float[Array, "B K J R H"], ...]
    values: tuple[Float[Array, "B K J R H"], ...]


@struct.dataclass
class Sampling:
    """Sampling options of a batch, one entry a row; arrays, so that no option recompiles anything.

    `temperature` 0 means greedy, `top_k` 0, `top_p` 1 and `min_p` 0 mean off. `seed` is a 64-bit
    number as two 32-bit words. `prompt_tokens` marks ids that occur in the prompt (for the
    repetition penalty).
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    logit_bias: Float[Array, "B V"]
    prompt_tokens: Bool[Array, "B V"]
    seed: UInt32[Array, "B 2"]
    eos_ids: Int[Array, "B E"]
    max_length: Int[Array, "B"]


@struct.dataclass
class Logprobs:
    """Log-probabilities of emitted tokens, indexed by position in the text (0 for the prompt)."""

    chosen: Float[Array, "B S"]
    top: Float[Array, "B S n"]
    top_ids: Int[Array, "B S n"]


@struct.dataclass
class Draft:
    """Drafted tokens of every row, and the law they were drawn from.

    Row b drafts `count[b]` tokens; what `tokens` holds beyond them is padding. `law` holds
    log-probabilities, or is None when every drafted token is a point mass (a deterministic draft,
    or one whose verification needs no law). `drafter` says which of the loop's drafters a row's
    draft is of.
    """

    tokens: Int[Array, "B J"]
    count: Int[Array, "B"]
    law: Float[Array, "B J V"] | None
    drafter: Int[Array, "B"]


@struct.dataclass
class PreparedDrafts:
    """The speculation cache: for R outcomes of the running verification, what to draft after each.

    Branch r of row b is for the outcome (num_accepted[b, r], bonus_token[b, r]). A branch that is
    for no outcome has num_accepted -2. A draft ends before its first NO_TOKEN.
    """

    num_accepted: Int[Array, "B R"]
    bonus_token: Int[Array, "B R"]
    tokens: Int[Array, "B R J"]
    law: Float[Array, "B R J V"] | None


@struct.dataclass
class Verdict:
    """How many drafted tokens stand, and the token that the target adds after them, or NO_TOKEN."""

    num_accepted: Int[Array, "B"]
    bonus_token: Int[Array, "B"]


@struct.dataclass
class SpeculationStats:
    """A log of each row's rounds, by the position in the text of the first token they emitted.

    An entry holds 1 + the index of the drafter (0 where no round began), how many tokens it drafted
    and how many of them the target accepted. What is counted is left to the host (`engine.counts`),
    which alone knows where a text ended.
    """

    rounds: Int8[Array, "B S 3"]


@struct.dataclass
class Pace:
    """How each drafter fared in each row lately: older rounds count less.

    `tried` drafted tokens were judged (those behind the first rejected one were not), `accepted` of
    them stood; `idle` rounds have passed since the drafter last proposed something.
    """

    tried: Float[Array, "P B"]
    accepted: Float[Array, "P B"]
    idle: Int[Array, "P B"]


@struct.dataclass
class DecodeState:
    """A batch in the middle of decoding.

    `tokens[b, :lengths[b]]` is prompt and output of row b. The last of them is emitted but not yet
    in the cache: `cache.lengths == lengths - 1` between steps. `finish` holds codes of
    `decoding.finish`. `output_counts` says how often each id was emitted (for penalties).
    """

    cache: KVCache
    tokens: Int[Array, "B S"]
    lengths: Int[Array, "B"]
    finish: Int[Array, "B"]
    output_counts: Int[Array, "B V"]
    logprobs: Logprobs | None


@struct.dataclass
class LookupStats:
    """Which drafts came out of the speculation cache, by position as in `SpeculationStats`.

    An entry is 1 + the index of the branch, 0 where no prepared draft was found.
    """

    found: Int[Array, "B S"]


@struct.dataclass
class SpeculatorState:
    """What the draft device knows in speculative speculative decoding.

    `text` mirrors the target's text (its cache is the draft model's), `draft` is what the running
    verification judges, `was_hit` whether it came out of the speculation cache, `prepared` what to
    draft after it. `tables` are those of an n-gram fallback, if there is one.
    """

    text: DecodeState
    prepared: PreparedDrafts
    draft: Draft
    was_hit: Bool[Array, "B"]
    tables: PyTree
    stats: LookupStats


@struct.dataclass
class SpeculativeState:
    """A batch decoded with speculation; `drafter` is what the drafter remembers.

    `pace` is None where drafts are as long as they may be.
    """

    target: DecodeState
    drafter: PyTree
    stats: SpeculationStats
    pace: Pace | None
