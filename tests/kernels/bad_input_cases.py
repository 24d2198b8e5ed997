"""The Mosaic kernels on the problems of `bad_inputs`, each in a process of its own."""

import functools

import jax
import numpy as np
from bad_inputs import CLEAN, PROBLEMS, judge

from pallas_kernels import backward_sm100, decode_sm90, decode_sm100, forward_sm90, forward_sm100
from pallas_kernels.decode_rows import kernels
from pallas_kernels.decode_splits import DecodeConfig, unsupported
from pallas_kernels.forward_sm90 import HopperConfig
from pallas_kernels.proof.interpret import params


def implementation(kernel, op):
    """The op as that chip's kernels compute it in the interpreter."""
    if op == "attention_backward":
        return functools.partial(backward_sm100.attention_backward, interpret=params())
    if op == "attention" and kernel == "sm_100":
        return functools.partial(forward_sm100.attention, interpret=params())
    if op == "attention":
        config = HopperConfig()
        return functools.partial(forward_sm90.attention, config=config, interpret=params())
    attend = {"sm_90": decode_sm90, "sm_100": decode_sm100}[kernel].attend
    config = DecodeConfig(split_blocks=2)
    return kernels(functools.partial(attend, config=config, interpret=params()), unsupported)[
        op
    ].run


def of_kernel(*, kernel, op):
    """What is wrong with a kernel's result, and how far its clean row is from the reference."""
    problem = PROBLEMS[op]()
    found = implementation(kernel, op)(*problem.arrays, **problem.options)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(problem.reference()), strict=True)
    pairs = [(np.asarray(got[CLEAN]), np.asarray(want[CLEAN])) for got, want in leaves]
    pairs = [(got.astype(np.float64), want.astype(np.float64)) for got, want in pairs]
    errors = [np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) for got, want in pairs]
    return {"wrong": judge(problem, found), "relative_rms": float(max(errors))}
