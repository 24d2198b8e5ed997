"""Attention kernels for decoding, each specified by a plain XLA reference."""

from pallas_kernels.reference import cached_attention as cached_attention
from pallas_kernels.reference import tree_attention as tree_attention
from pallas_kernels.registry import explain as explain
