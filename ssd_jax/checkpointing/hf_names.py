"""Which Hugging Face tensors make up which of our leaves, as one table for all families.

Hugging Face stores linear weights as [outputs, inputs], with query head n = k * G + g as g-th head
of kv head k. A `Piece` says how such a tensor lies inside a leaf of ours; loading writes through
that view and exporting reads through it, so the two cannot disagree.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ssd_jax.checkpointing.leaves import leaf_shapes
from ssd_jax.config import ModelConfig

EMBEDDING_KEY = "model.embed_tokens.weight"
LM_HEAD_KEY = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A Hugging Face tensor as a part of one of our leaves.

    Transposing the leaf by `axes` (None: as it is) and then taking `index` gives the tensor with
    its axes unfolded. The last `num_inputs` axes of that view fold into the tensor's last axis,
    those before them into its first; with 0 all of them fold into the only axis of a vector.
    """

    key: str
    axes: tuple[int, ...] | None = None
    index: tuple[int | slice, ...] = ()
    num_inputs: int = 1

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The part of the leaf that this tensor fills, in the tensor's order, sharing memory."""
        return (leaf if self.axes is None else leaf.transpose(self.axes))[self.index]

    def tensor_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor, for a leaf of the given shape."""
        shape = self.view(np.broadcast_to(np.int8(0), leaf_shape)).shape
        split = len(shape) - self.num_inputs
        outputs = math.prod(shape[:split])
        return (outputs, math.prod(shape[split:])) if self.num_inputs else (outputs,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafSpec:
    """A leaf of our tree and the tensors that fill it."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


_ALL_BUT_LAST_TWO = (slice(None), slice(None, -2))  # the G query heads of [K, G+2, ...]
_SECOND_LAST = (slice(None), -2)
_LAST = (slice(None), -1)

_LAYER_PIECES: dict[str, tuple[Piece, ...]] = {
    "attention_norm": (Piece(key="input_layernorm.weight", num_inputs=0),),
    "qkv": (  # [D, K, G+2, H], seen as [K, G+2, H, D]
        Piece(key="self_attn.q_proj.weight", axes=(1, 2, 3, 0), index=_ALL_BUT_LAST_TWO),
        Piece(key="self_attn.k_proj.weight", axes=(1, 2, 3, 0), index=_SECOND_LAST),
        Piece(key="self_attn.v_proj.weight", axes=(1, 2, 3, 0), index=_LAST),
    ),
    "qkv_bias": (  # [K, G+2, H]
        Piece(key="self_attn.q_proj.bias", index=_ALL_BUT_LAST_TWO, num_inputs=0),
        Piece(key="self_attn.k_proj.bias", index=_SECOND_LAST, num_inputs=0),
        Piece(key="self_attn.v_proj.bias", index=_LAST, num_inputs=0),
    ),
    "query_norm": (Piece(key="self_attn.q_norm.weight", num_inputs=0),),
    "key_norm": (Piece(key="self_attn.k_norm.weight", num_inputs=0),),
    # [K, G, H, D], seen as [D, K, G, H]
    "output": (Piece(key="self_attn.o_proj.weight", axes=(3, 0, 1, 2), num_inputs=3),),
    "output_bias": (Piece(key="self_attn.o_proj.bias", num_inputs=0),),
    "mlp_norm": (Piece(key="post_attention_layernorm.weight", num_inputs=0),),
    "gate_up": (  # [D, 2, F], seen as [2, F, D]
        Piece(key="mlp.gate_proj.weight", axes=(1, 2, 0), index=(0,)),
        Piece(key="mlp.up_proj.weight", axes=(1, 2, 0), index=(1,)),
    ),
    "gate_up_bias": (  # [2, F]
        Piece(key="mlp.gate_proj.bias", index=(0,), num_inputs=0),
        Piece(key="mlp.up_proj.bias", index=(1,), num_inputs=0),
    ),
    "down": (Piece(key="mlp.down_proj.weight", axes=(1, 0)),),
    "down_bias": (Piece(key="mlp.down_proj.bias", num_inputs=0),),
}

_MODEL_PIECES: dict[str, tuple[Piece, ...]] = {
    "embedding": (Piece(key=EMBEDDING_KEY),),
    "final_norm": (Piece(key="model.norm.weight", num_inputs=0),),
    "lm_head": (Piece(key=LM_HEAD_KEY, axes=(1, 0)),),
}

# Tables that versions of transformers stored although they follow from the configuration.
_IGNORABLE_KEY = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)"
)
_COMPILED = "_orig_mod."  # what torch.compile puts before the name of a module
_WRAPPED = "module."  # what data-parallel wrappers put before all names
_BASE = "model."  # what a model saved without its output matrix lacks


def leaf_specs(config: ModelConfig) -> tuple[LeafSpec, ...]:
    """Every leaf of a model with the tensors that fill it, in the order of the tree."""
    return tuple(
        LeafSpec(name=name, shape=shape, pieces=_pieces(name))
        for name, shape in leaf_shapes(config).items()
    )


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """The name that this loader's table uses, for each name that a checkpoint uses.

    Models are also saved from inside the wrappers of torch.compile and of data-parallel training,
    or as the base model alone, whose names lack the first part. Two names may come out equal.
    """
    names = {key: key.replace(_COMPILED, "") for key in keys}
    if names and all(name.startswith(_WRAPPED) for name in names.values()):
        names = {key: name.removeprefix(_WRAPPED) for key, name in names.items()}
    if EMBEDDING_KEY.removeprefix(_BASE) in names.values() and EMBEDDING_KEY not in names.values():
        names = {k: name if name == LM_HEAD_KEY else _BASE + name for k, name in names.items()}
    return names


def is_ignorable_key(key: str) -> bool:
    """Whether a checkpoint may hold this tensor without any leaf taking it."""
    return _IGNORABLE_KEY.fullmatch(key) is not None


def _pieces(name: str) -> tuple[Piece, ...]:
    """Pieces of the leaf with the given name, with their full keys."""
    if name in _MODEL_PIECES:
        return _MODEL_PIECES[name]
    _, layer, field = name.split(".")
    pieces = _LAYER_PIECES[field]
    return tuple(replace(piece, key=f"model.layers.{layer}.{piece.key}") for piece in pieces)
