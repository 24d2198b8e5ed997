"""Attention as the decoder calls it: the only module that talks to `pallas_kernels`."""

from jaxtyping import Array, Float, Int

import pallas_kernels

_PROMPT_TOKENS = 128  # from here on a pass is a prompt's chunk and not the check of a draft


def attend(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start: Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    """Causal attention of T new tokens over a cache that already holds their keys and values.

    Token t of row b sits in slot start[b] + t and sees the slots up to its own.
    """
    num_tokens = query.shape[1]
    if num_tokens == 1:
        return pallas_kernels.decode_attention(query[:, 0], keys, values, start + 1)[:, None]
    if num_tokens < _PROMPT_TOKENS:
        return pallas_kernels.verify_attention(query, keys, values, start)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    return pallas_kernels.attention(query, keys, values, start=start, causal=True)


def attend_branches(
    query: Float[Array, "B R N H"],
    trunk_keys: Float[Array, "B K S H"],
    trunk_values: Float[Array, "B K S H"],
    trunk_lengths: Int[Array, "B R"],
    branch_keys: Float[Array, "B K J R H"],
    branch_values: Float[Array, "B K J R H"],
    step: Int[Array, ""],
) -> Float[Array, "B R N H"]:
    """Attention of one token in each of R branches over a shared trunk and the branch's own past.

    Branch r sees the first trunk_lengths[b, r] slots and its own keys of steps 0 .. step.
    """
    return pallas_kernels.tree_attention(
        query, trunk_keys, trunk_values, trunk_lengths, branch_keys, branch_values, step
    )
