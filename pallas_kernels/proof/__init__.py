"""Proofs of the kernels without a GPU: interpreter with races, compilation, counts, cycles."""
