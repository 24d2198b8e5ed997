"""Models made slower without changing what they say, to measure other cost ratios."""

import dataclasses

import jax.numpy as jnp

from ssd_jax import Model


def add_idle_layers(model: Model, count: int) -> Model:
    """The model with `count` more layers that add nothing to the residual stream.

    They are copies of the last layer with output and down projections of zero: every product is
    computed, and every logit stays what it was.
    """
    last = model.params.layers[-1]
    idle = [
        dataclasses.replace(
            last,
            qkv=jnp.array(last.qkv, copy=True),
            gate_up=jnp.array(last.gate_up, copy=True),
            output=jnp.zeros_like(last.output),
            output_bias=None if last.output_bias is None else jnp.zeros_like(last.output_bias),
            down=jnp.zeros_like(last.down),
            down_bias=None if last.down_bias is None else jnp.zeros_like(last.down_bias),
        )
        for _ in range(count)
    ]
    config = dataclasses.replace(model.config, num_layers=model.config.num_layers + count)
    params = dataclasses.replace(model.params, layers=(*model.params.layers, *idle))
    return dataclasses.replace(model, config=config, params=params)
