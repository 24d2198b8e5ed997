"""The forward pass of attention on Blackwell (sm_100a): what it can compute, and its launch.

What its warpgroups do is in `forward_roles_sm100`, what they work on in `forward_schedule`.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention_config import ForwardConfig, forward_config
from pallas_kernels.forward_roles_sm100 import ForwardKernel
from pallas_kernels.forward_schedule import Schedule
from pallas_kernels.registry import Kernel

HEAD_DIMS = (64, 128, 192, 256)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: Int[Array, "B"] | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    config: ForwardConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The attended values and the natural LSE of the scores; see `ops.attention`.

    Values past a row's length must be finite where they share a block with visible ones; whole
    blocks past it are not read. `interpret` runs the kernel in the interpreter.
    """
    batch, num_tokens, num_heads, head_dim = query.shape
    if config is None:
        config = forward_config(head_dim, soft_cap=soft_cap, window=window)
    schedule = Schedule(
        batch=batch,
        num_tokens=num_tokens,
        num_slots=key.shape[1],
        num_heads=num_heads,
        num_kv_heads=key.shape[2],
        head_bytes=head_dim * query.dtype.itemsize,
        tiles=config.tiles,
        blocks=config.blocks,
        block_kv=config.block_kv,
        causal=causal,
        window=window,
        has_bounds=lengths is not None or start is not None,
    )
    call = ForwardKernel(
        config=config,
        schedule=schedule,
        head_dim=head_dim,
        dtype=jnp.dtype(query.dtype),
        scale=scale,
        soft_cap=soft_cap,
        interpreted=interpret is not None,
    )
    operands = [query, key, value]
    if schedule.has_bounds:
        nothing = jnp.zeros(batch, jnp.int32)
        first = nothing if start is None else start.astype(jnp.int32)
        length = nothing + schedule.num_slots if lengths is None else lengths.astype(jnp.int32)
        operands.append(jnp.stack([first, jnp.clip(length, 0, schedule.num_slots)], axis=1))
    kernel = plgpu.kernel(
        call.body,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(
                (batch, num_heads, schedule.num_row_blocks * schedule.rows), jnp.float32
            ),
        ),
        scratch_types=call.scratch_types(),
        grid=(min(config.programs // config.blocks, schedule.num_items),),
        grid_names=("program",),
        **({"cluster": (2,), "cluster_names": ("pair",)} if config.pair else {}),
        num_threads=config.tiles + 2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="attention_forward_sm100",
        interpret=interpret,
    )
    out, lse = kernel(*operands)
    return out, lse[:, :, :num_tokens]


def unsupported(
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    value: jax.ShapeDtypeStruct,
    lengths: jax.ShapeDtypeStruct | None,
    start: jax.ShapeDtypeStruct | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    config: ForwardConfig | None = None,
) -> str | None:
    """Why `attention` cannot compute this, or None."""
    del lengths, start, causal
    head_dim = query.shape[-1]
    dtypes = {str(x.dtype) for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"needs query, key and value all bfloat16 or all float16, not {sorted(dtypes)}"
    if head_dim not in HEAD_DIMS:
        return f"is written for head dims {HEAD_DIMS}, not {head_dim}"
    if key.shape != value.shape:
        return f"needs keys and values of one shape, not {key.shape} and {value.shape}"
    if 0 in query.shape or 0 in key.shape:
        return f"has nothing to do for query {query.shape} and key {key.shape}"
    if scale <= 0:
        return f"needs a positive scale, not {scale}"
    config = config or forward_config(head_dim, soft_cap=soft_cap, window=window)
    return config.does_not_fit(head_dim)


KERNELS = {"attention": Kernel(run=attention, unsupported=unsupported)}
