"""The Triton decode kernel: values in Triton's interpreter, and compilation for its chips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

triton = pytest.importorskip(
    "triton", reason="needs the packages triton and jax-triton: install the extra `triton`"
)

CASES = [
    {"num_rows": 4, "head_dim": 64, "dtype": "float16", "lengths": [130, 0], "with_bits": False},
    {"num_rows": 20, "head_dim": 128, "dtype": "float16", "lengths": [200], "with_bits": True},
    {
        "num_rows": 4,
        "head_dim": 64,
        "dtype": "float16",
        "lengths": [200],
        "with_bits": True,
        "bad_slot": 150,
    },
]
CHIPS = (80, 86, 89, 120)
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 120: 99}  # KiB that one block may have


def test_values():
    cases = [{"num_slots": 256} | case for case in CASES]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "triton_cases", json.dumps(cases)]
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for figures, case in zip(json.loads(ran.stdout.splitlines()[-1]), cases, strict=True):
        assert figures["relative_rms"] < 3e-3
        assert figures["lse"] < 2e-4
        assert figures["blind_right"]
        assert figures["bad_right"]
        assert (figures["bad"] > 0) == ("bad_slot" in case)
        assert (figures["blind"] > 0) == (0 in case["lengths"])


@pytest.mark.parametrize("with_bits", [False, True], ids=["verify", "tree"])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, with_bits, tmp_path):
    """To machine code, without a GPU: tensor core products, no spills, memory that fits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels import decode_triton

    config = decode_triton.triton_config(num_rows=40, num_slots=8192)
    constants, _ = decode_triton.launch((1, 8, 40, 128), 8192, with_bits, 0.1, config)
    types = ["*bf16"] * 3 + ["*i32"] * 4 + ["*fp32"] * 2
    kernel = decode_triton.attend_kernel
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(
        constants, "constexpr"
    )
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", chip, 32),
        options=dict(decode_triton.compiler_options(config)),
    )
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert f".target sm_{chip}" in compiled.asm["ptx"]
    assert "mma.sync.aligned" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY[chip] * 1024
    program = tmp_path / "cubin"
    program.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.check_output([tool, "--dump-resource-usage", program], text=True)
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (jnp.bfloat16, 128, None),
        (jnp.float32, 128, "takes bfloat16 or float16, the same for all, got float32"),
        (jnp.float16, 80, "takes head dims 64 and 128, got 80"),
    ],
)
def test_reasons(dtype, head_dim, reason):
    from pallas_kernels import decode_triton

    cache = jax.ShapeDtypeStruct((1, 2, 100, head_dim), dtype)
    query = jax.ShapeDtypeStruct((1, 8, head_dim), dtype)
    unsupported = decode_triton.KERNELS["decode_attention"].unsupported
    assert unsupported(query, cache, cache, None, scale=1.0) == reason
    table = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    paged = unsupported(query, cache, cache, None, scale=1.0, page_table=table)
    assert paged == (reason or "takes no page tables")
