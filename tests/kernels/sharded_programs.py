"""The ops inside shard_map, compiled for GPUs that are not there; run as a program, writes JSON.

Arguments: the chip, then the ops. In the environment of `proof/ahead_of_time.py`.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.proof.targets import TARGETS

BATCH, TOKENS, HEADS, KV_HEADS, SLOTS, HEAD_DIM, STEPS, PAGES = 2, 3, 16, 8, 1024, 128, 4, 8


def cases():
    """Each op's function, and the shapes and shardings of its arguments; kv heads are sharded."""
    heads, kv_heads = P(None, None, "x"), P(None, "x")
    query = (BATCH, TOKENS, HEADS, HEAD_DIM), jnp.bfloat16, heads
    cache = (BATCH, KV_HEADS, SLOTS, HEAD_DIM), jnp.bfloat16, kv_heads
    pool = (BATCH * PAGES, KV_HEADS, SLOTS // PAGES, HEAD_DIM), jnp.bfloat16, kv_heads
    counts = (BATCH,), jnp.int32, P()
    own = (BATCH, KV_HEADS, STEPS, TOKENS, HEAD_DIM), jnp.bfloat16, kv_heads
    one = (BATCH, HEADS, HEAD_DIM), jnp.bfloat16, P(None, "x")
    prompt = (BATCH, SLOTS, KV_HEADS, HEAD_DIM), jnp.bfloat16, heads
    asked = (BATCH, SLOTS, HEADS, HEAD_DIM), jnp.bfloat16, heads
    table = (BATCH, PAGES), jnp.int32, P()
    words = (BATCH, TOKENS, 2), jnp.uint32, P()
    lengths, step = ((BATCH, TOKENS), jnp.int32, P()), ((), jnp.int32, P())

    def paged(query, keys, values, lengths, table):
        return pallas_kernels.decode_attention(query, keys, values, lengths, page_table=table)

    def causal(query, key, value):
        return pallas_kernels.attention(query, key, value, causal=True)

    def gradient(query, key, value):
        return jax.grad(lambda q: causal(q, key, value).astype(jnp.float32).sum())(query)

    return {
        "decode": (pallas_kernels.decode_attention, (one, cache, cache, counts)),
        "pages": (paged, (one, pool, pool, counts, table)),
        "verify": (pallas_kernels.verify_attention, (query, cache, cache, counts)),
        "ancestor": (pallas_kernels.ancestor_attention, (query, cache, cache, counts, words)),
        "tree": (
            pallas_kernels.tree_attention,
            (query, cache, cache, lengths, own, own, step),
        ),
        "attention": (causal, (asked, prompt, prompt)),
        "gradient": (gradient, (asked, prompt, prompt)),
    }


def compiled(chip, case):
    """The kernels and the collectives of a case compiled for two GPUs."""
    function, arguments = cases()[case]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[chip].description(), topology="1x1x2"
    )
    mesh = topologies.make_mesh(topology, (2,), ("x",))
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(spec for _, _, spec in arguments),
        out_specs=arguments[0][2],
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    text = jax.jit(mapped).lower(*shapes).compile().as_text()
    collectives = re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)\(", text)
    kernels = sorted(set(re.findall(r"attention_\w+?_sm\d+", text)))
    return {"kernels": kernels, "mosaic": text.count("mosaic_gpu"), "collectives": collectives}


if __name__ == "__main__":
    chip, *names = sys.argv[1:]
    sys.stdout.write(json.dumps({name: compiled(chip, name) for name in names}))
