"""The ops inside shard_map with its default checks: on CPU devices, and compiled for two GPUs."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.manual_axes import per_device
from pallas_kernels.proof.ahead_of_time import interpreters, missing

B, T, N, K, S, H, J = 2, 3, 8, 4, 256, 64, 2
HEADS = P(None, None, "x")


@pytest.fixture(scope="module")
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))


def draw(*shape, seed=0, dtype="bfloat16"):
    values = np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)
    return jnp.asarray(values, dtype)


def cases(dtype):
    """Each op's arguments, and how they are sharded over kv heads."""
    query = draw(B, T, N, H, dtype=dtype), HEADS
    cache = [(draw(B, K, S, H, seed=seed, dtype=dtype), P(None, "x")) for seed in (1, 2)]
    own = [(draw(B, K, J, T, H, seed=seed, dtype=dtype), P(None, "x")) for seed in (3, 4)]
    counts = jnp.array([70, 200], jnp.int32), P()
    words = jnp.full((B, T, 2), 5, jnp.uint32), P()
    lengths = jnp.tile(counts[0][:, None], T), P()
    prompt = [(draw(B, S, K, H, seed=seed, dtype=dtype), HEADS) for seed in (5, 6)]
    return {
        "attention": [query, *prompt],
        "decode_attention": [(query[0][:, 0], P(None, "x")), *cache, counts],
        "verify_attention": [query, *cache, counts],
        "ancestor_attention": [query, *cache, counts, words],
        "tree_attention": [query, *cache, lengths, *own, (jnp.int32(1), P())],
    }


@pytest.mark.parametrize(
    ("op", "dtype", "transform"),
    [
        *((op, dtype, "jit") for op in cases("float32") for dtype in ("bfloat16", "float32")),
        ("verify_attention", "bfloat16", "vmap"),
        ("verify_attention", "bfloat16", "eager"),
    ],
)
def test_sharded_over_kv_heads(mesh, op, dtype, transform):
    arrays, specs = zip(*cases(dtype)[op], strict=True)
    function = getattr(pallas_kernels, op)
    whole = function(*arrays)
    if transform == "vmap":
        single = function
        function = lambda *arrays: jax.vmap(single)(*(x[None] for x in arrays))[0]  # noqa: E731
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0])
    got = (sharded if transform == "eager" else jax.jit(sharded))(*arrays)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(whole, np.float32), rtol=0.01, atol=0.004
    )


def test_a_page_table_inside(mesh):
    (query, spec), (keys, of_cache), (values, _), (lengths, _) = cases("bfloat16")[
        "decode_attention"
    ]
    table = jnp.array([[1, 0], [2, 3]], jnp.int32)
    pools = [
        x.reshape(B, K, 2, 128, H).swapaxes(1, 2).reshape(-1, K, 128, H) for x in (keys, values)
    ]

    def paged(query, keys, values, lengths, table):
        return pallas_kernels.decode_attention(query, keys, values, lengths, page_table=table)

    sharded = jax.shard_map(
        paged, mesh=mesh, in_specs=(spec, of_cache, of_cache, P(), P()), out_specs=spec
    )
    got, want = (
        jax.jit(sharded)(query, *pools, lengths, table),
        paged(query, *pools, lengths, table),
    )
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_gradients_of_what_is_the_same_everywhere_are_summed(mesh):
    """Queries are sharded over the batch, keys and values are not."""
    query = draw(B, T, N, H, dtype="float32")
    key, value = (draw(1, S, K, H, seed=seed, dtype="float32") for seed in (1, 2))

    def loss(attend, *arrays):
        return jnp.sum(attend(*arrays) ** 2)

    def attend(query, key, value):
        wide = [jnp.broadcast_to(x, (query.shape[0], *x.shape[1:])) for x in (key, value)]
        return pallas_kernels.attention(query, *wide)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x"))
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, one), (0, 1, 2)))(query, key, value)
        for one in (sharded, attend)
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_only_arrays_that_vary_are_wrapped():
    jaxpr = jax.make_jaxpr(functools.partial(per_device, jnp.sin))(jnp.ones(3))
    assert [one.primitive.name for one in jaxpr.eqns] == ["sin"]


KERNEL_OF = {"attention": "attention_forward", "gradient": "attention_forward"}
PROGRAMS = ["decode", "pages", "verify", "ancestor", "tree", "attention", "gradient"]


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "chip"), [("h200", "sm90"), ("b200", "sm100")])
def test_two_gpus_run_the_kernels_on_their_own_heads(gpu, chip):
    """Compiled ahead of time: the Mosaic kernels are in the program, and nothing is gathered."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if "site-packages" not in path),
    }
    command = [interpreters()[0], "-m", "sharded_programs", gpu, *PROGRAMS]
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    for program in PROGRAMS:
        kernel = f"{KERNEL_OF.get(program, 'attention_decode')}_{chip}"
        assert kernel in found[program]["kernels"]
        assert found[program]["collectives"] == []
