"""Attention kernels for prefill and decoding, each specified by a plain XLA reference."""

from pallas_kernels.ops import ancestor_attention as ancestor_attention
from pallas_kernels.ops import attention as attention
from pallas_kernels.ops import attention_with_lse as attention_with_lse
from pallas_kernels.ops import decode_attention as decode_attention
from pallas_kernels.ops import tree_attention as tree_attention
from pallas_kernels.ops import verify_attention as verify_attention
from pallas_kernels.registry import UnsupportedError as UnsupportedError
from pallas_kernels.registry import explain as explain
