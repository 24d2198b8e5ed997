"""Which model runs where: a model runs on the devices that hold its weights.

`place_model` puts one on a device, `shard_model` spreads one over several (tensor parallel),
`repeat_model` repeats a draft on several, which then divide its branches. States and options follow
the weights.
"""

import dataclasses
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ssd_jax.errors import ConfigError
from ssd_jax.model import Model, transpose_output
from ssd_jax.types import DecodeState, LayerParams

MODEL_AXIS = "model"
BRANCH_AXIS = "branch"


def place_model(model: Model, device: jax.Device) -> Model:
    """The model with its weights on one device."""
    params = transpose_output(model.params) if device.platform == "cpu" else model.params
    return dataclasses.replace(model, params=jax.device_put(params, device))


def repeat_model(model: Model, devices: list[jax.Device]) -> Model:
    """The model with whole weights on each device, for a draft whose branches they divide."""
    whole = NamedSharding(Mesh(devices, (BRANCH_AXIS,)), PartitionSpec())
    return dataclasses.replace(model, params=jax.device_put(model.params, whole))


def branch_mesh(draft: Model) -> Mesh | None:
    """The devices over which `repeat_model` repeated a draft, None if it did not."""
    sharding = draft.params.embedding.sharding
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (BRANCH_AXIS,):
        return cast("Mesh", sharding.mesh)
    return None


def spare_device(model: Model) -> jax.Device:
    """A device for a draft: the last one that the target does not use, else one it does use."""
    used = model.params.embedding.devices()
    free = [device for device in jax.devices() if device not in used]
    return free[-1] if free else min(used, key=lambda device: device.id)


def shard_model(model: Model, devices: list[jax.Device]) -> Model:
    """The model with its weights spread over devices: heads and feed-forward columns are divided.

    Embedding, norms and output are whole on every device.

    Raises:
        ConfigError: the key/value heads or the feed-forward width do not divide evenly.
    """
    config, count = model.config, len(devices)
    if config.num_kv_heads % count or config.intermediate_size % count:
        raise ConfigError(
            "A model is spread over a number of devices that divides its key/value heads and its "
            f"intermediate size, got {count} devices for {config.num_kv_heads} heads and "
            f"{config.intermediate_size}: use fewer devices."
        )
    mesh = Mesh(devices, (MODEL_AXIS,))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, model.params)
    layers = tuple(
        dataclasses.replace(layer, **_layer_shardings(mesh, layer)) for layer in model.params.layers
    )
    shardings = dataclasses.replace(shardings, layers=layers)
    return dataclasses.replace(model, params=jax.device_put(model.params, shardings))


def home(model: Model) -> Sharding:
    """Where a model wants its small arrays: on its device, or whole on each device of its mesh."""
    sharding = model.params.embedding.sharding
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def place_state(state: DecodeState, model: Model) -> DecodeState:
    """A state on the model's devices, its cache divided as the heads are."""
    small = home(model)
    cache = small
    if isinstance(small, NamedSharding) and MODEL_AXIS in small.mesh.axis_names:
        cache = NamedSharding(small.mesh, PartitionSpec(None, MODEL_AXIS))
    shardings = jax.tree.map(lambda _: small, state)
    heads = jax.tree.map(lambda _: cache, (state.cache.keys, state.cache.values))
    placed = dataclasses.replace(shardings.cache, keys=heads[0], values=heads[1])
    return jax.device_put(state, dataclasses.replace(shardings, cache=placed))


def _layer_shardings(mesh: Mesh, layer: LayerParams) -> dict[str, Any]:
    """The sharding of each weight of a layer, None for those it does not have."""
    model = MODEL_AXIS
    specs = {
        "attention_norm": PartitionSpec(),
        "qkv": PartitionSpec(None, model),
        "qkv_bias": PartitionSpec(model),
        "query_norm": PartitionSpec(),
        "key_norm": PartitionSpec(),
        "output": PartitionSpec(model),
        "output_bias": PartitionSpec(),
        "mlp_norm": PartitionSpec(),
        "gate_up": PartitionSpec(None, None, model),
        "gate_up_bias": PartitionSpec(None, model),
        "down": PartitionSpec(model),
        "down_bias": PartitionSpec(),
    }
    return {
        name: None if getattr(layer, name) is None else NamedSharding(mesh, spec)
        for name, spec in specs.items()
    }
