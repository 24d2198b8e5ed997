"""Decode speed at batch 1 against what the memory allows.

    python bench/decode_speed.py [--threads 1] [--dtype float32 bfloat16] [--scan]

A random 60 M-parameter Llama (hidden 512, 12 layers, 8/4 heads, vocabulary 4096) decodes greedily
with the engine's own program. Each token has to read every weight once, so (bytes of weights) x
(tokens/s) over the read bandwidth says how close to the limit it runs. The bandwidth is measured in
the same run, between the decode rounds, by reading the weights themselves with the fastest of two
readers. Medians over interleaved rounds; one JSON record on stdout.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

from ssd_jax.json_text import to_json


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Decode speed against read bandwidth.")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use (1)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=32, help="tokens in a round (32)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--scan", action="store_true", help="also: layers stacked under a scan")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)
    for name in ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(len(cores))
    records = [measure(dtype, args.tokens, args.rounds, args.scan) for dtype in args.dtype]
    print(to_json({"threads": len(cores), "decode": records}, indent=2))


def measure(dtype: str, num_tokens: int, rounds: int, with_scan: bool) -> dict[str, object]:
    """Speed, bandwidth and their ratio for one precision."""
    import jax
    import numpy as np

    from ssd_jax.config import ModelConfig
    from ssd_jax.models.init import random_params

    config = ModelConfig(
        family="llama",
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2560,
        num_layers=12,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        max_context=4096,
    )
    params = random_params(config, 0, dtype)
    # The embedding is looked up, not read.
    weights = [leaf for leaf in jax.tree.leaves(params) if leaf is not params.embedding]
    bytes_per_token = sum(leaf.nbytes for leaf in weights)
    buffers = [np.asarray(leaf) for leaf in weights]
    contenders = {"unrolled": decoder(config, params, num_tokens)}
    if with_scan:
        contenders["scanned"] = scanned_decoder(config, params, num_tokens)
    compile_seconds = {name: timed(run) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    bandwidths = []
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(timed(run) / num_tokens)
        bandwidths.append(read_bandwidth(buffers))
    bandwidth = statistics.median(bandwidths)
    record: dict[str, object] = {
        "dtype": dtype,
        "parameters": config.num_params,
        "weight_bytes_per_token": bytes_per_token,
        "read_bandwidth_bytes_per_s": bandwidth,
        "read_bandwidth_min_max": [min(bandwidths), max(bandwidths)],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for name, values in seconds.items():
        median = statistics.median(values)
        record[name] = {
            "tokens_per_s": 1 / median,
            "tokens_per_s_min_max": [1 / max(values), 1 / min(values)],
            "share_of_bandwidth": bytes_per_token / median / bandwidth,
            "first_call_seconds": compile_seconds[name],
        }
    return record


def decoder(config, params, num_tokens: int) -> Callable[[], None]:  # noqa: ANN001
    """The engine's decode loop: the same `num_tokens` tokens at every call."""
    import jax
    import numpy as np

    from ssd_jax import Model, SamplingParams
    from ssd_jax.decoding.autoregressive import decode
    from ssd_jax.decoding.state import initial_state
    from ssd_jax.engine.batch import make_batch, make_requests

    model = Model(config=config, params=params, tokenizer=None)
    options = SamplingParams(max_tokens=96, ignore_eos=True)
    batch = make_batch(model, make_requests(model, [list(range(1, 9))], options))

    def run() -> None:
        state = initial_state(
            config,
            batch.tokens,
            batch.lengths,
            batch.finish,
            dtype=params.embedding.dtype,
            num_top_logprobs=None,
        )
        state = decode(config, params, batch.sampling, state, np.int32(num_tokens))
        jax.block_until_ready(state)

    return run


def scanned_decoder(config, params, num_tokens: int) -> Callable[[], None]:  # noqa: ANN001
    """The same model with its layers stacked under `lax.scan`, to compare with."""
    import jax
    import jax.numpy as jnp

    from ssd_jax.kv_cache import init_cache
    from ssd_jax.models.decoder import attention_block, compute_logits, mlp_block, rms_norm
    from ssd_jax.models.rope import rope_angles

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.layers)
    cache = init_cache(config, 1, 128, params.embedding.dtype)
    caches = jnp.stack(cache.keys), jnp.stack(cache.values)

    @jax.jit
    def decode(params, stacked, keys, values):  # noqa: ANN001, ANN202
        def step(position, carry):  # noqa: ANN001, ANN202
            token, keys, values = carry
            start = position[None]
            cos, sin = rope_angles(config, start[:, None])

            def layer_step(x, layer):  # noqa: ANN001, ANN202
                weights, k, v = layer
                attended, k, v = attention_block(config, weights, x, k, v, start, cos, sin)
                x = x + attended
                return x + mlp_block(config, weights, x), (k, v)

            x = params.embedding[token]
            x, (keys, values) = jax.lax.scan(layer_step, x, (stacked, keys, values))
            logits = compute_logits(params, rms_norm(x, params.final_norm, config.rms_norm_eps))
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), keys, values

        first = jnp.ones((1, 1), jnp.int32)
        return jax.lax.fori_loop(0, num_tokens, step, (first, keys, values))[0]

    return lambda: decode(params, stacked, *caches).block_until_ready()


def read_bandwidth(buffers) -> float:  # noqa: ANN001
    """Bytes per second at which this process reads the arrays, by the faster of two readers."""
    import numpy as np

    flat = [buffer.reshape(-1).view(np.uint8) for buffer in buffers]
    words = [part[: part.size // 8 * 8].view(np.uint64) for part in flat]
    rows = [part[: part.size // 4096 * 4096].view(np.float32).reshape(-1, 1024) for part in flat]
    vector = np.zeros(1024, np.float32)
    total = sum(part.size for part in flat)
    by_maximum = timed(lambda: [part.max() for part in words])
    by_product = timed(lambda: [matrix @ vector for matrix in rows])
    return total / min(by_maximum, by_product)


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
