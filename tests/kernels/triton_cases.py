"""The Triton kernel in Triton's interpreter: run with TRITON_INTERPRET=1, writes its errors.

The interpreter wants tensors that look like torch's; `HostTensor` is as much of one as it uses.
"""

import json
import sys

import ml_dtypes
import numpy as np
from decode_cases import naive

from pallas_kernels import decode_triton


class HostTensor:
    """A numpy array with the parts of a torch tensor that Triton's interpreter touches."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        self.dtype = {"float32": "fp32", "int32": "i32", "bfloat16": "bf16", "float16": "fp16"}[
            self.array.dtype.name
        ]

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def untyped_storage(self):
        return self

    def new_empty(self, *size, device):
        del size, device
        return HostTensor(self.array[:0])

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def set_(self, storage, *geometry):
        del geometry
        self.array = storage.array

    def copy_(self, other):
        """Nothing: the copy that the kernel wrote to shares its memory."""


def attend(case):
    rng = np.random.default_rng(0)
    low = np.dtype(getattr(ml_dtypes, case["dtype"], case["dtype"]))
    lengths = np.array(case["lengths"], np.int32)
    batch, num_rows, num_slots = len(lengths), case["num_rows"], case["num_slots"]
    rows = (rng.standard_normal((batch, 2, num_rows, case["head_dim"])) * 6).astype(low)
    keys, values = rng.standard_normal((2, batch, 2, num_slots, case["head_dim"])).astype(low)
    slot = np.arange(num_slots)
    hidden = (slot >= lengths[:, None])[:, None, :, None]
    keys, values = (np.where(hidden, low.type(np.nan), x) for x in (keys, values))
    if "bad_slot" in case:
        keys[0, 1, case["bad_slot"], 0] = np.nan
    drop = rng.integers(0, 70, (batch, num_rows), np.int32)
    limits = np.maximum(lengths[:, None] - drop, 0).astype(np.int32)
    distance = slot - limits[..., None]
    visible = distance < 0
    picked = rng.random((batch, num_rows, 64)) < 0.4
    words = np.packbits(picked, axis=-1, bitorder="little").view(np.int32)
    if case["with_bits"]:
        chosen = np.take_along_axis(picked, np.clip(distance, 0, 63), axis=-1)
        visible = visible | (distance >= 0) & (distance < 64) & chosen
        visible &= slot < lengths[:, None, None]
    scale = case["head_dim"] ** -0.5
    expected, expected_lse = naive(
        *(x.astype(np.float64) for x in (rows, keys, values)), visible, scale
    )
    config = decode_triton.TritonConfig(block_rows=16, block_kv=64, split_blocks=2)
    constants, grid = decode_triton.launch(rows.shape, num_slots, case["with_bits"], scale, config)
    leading = (batch, 2, constants["num_splits"], num_rows)
    outs = np.full((*leading, case["head_dim"]), np.nan, np.float32)
    lses = np.full(leading, np.nan, np.float32)
    arrays = (rows, keys, values, limits, words[..., 0], words[..., 1], lengths, outs, lses)
    decode_triton.attend_kernel[grid](*map(HostTensor, arrays), **constants)
    out, lse = decode_triton.combine(outs, lses, np.ones(leading, bool))
    blind, bad = np.isneginf(expected_lse), np.isnan(expected_lse)
    out, lse = np.asarray(out), np.asarray(lse)
    error, size = ((x[~bad] ** 2).mean() for x in (out - expected, expected))
    return {
        "relative_rms": float(np.sqrt(error / size)),
        "lse": float(np.max(np.abs(lse - expected_lse)[~blind & ~bad])),
        "bad": int(bad.sum()),
        "bad_right": bool((np.isnan(lse) == bad).all() and (np.isnan(out) == bad[..., None]).all()),
        "blind": int(blind.sum()),
        "blind_right": bool(np.all(np.isneginf(lse) == blind) and np.all(out[blind] == 0)),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps([attend(case) for case in json.loads(sys.argv[1])]))
