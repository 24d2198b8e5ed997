"""ssd-jax: exact LLM decoding at the speed limit, in JAX.

The public names are imported when they are first used, so that the command line's `--help` does not
wait for JAX.
"""

import importlib

TYPE_CHECKING = False  # as type checkers read that name; `typing` takes longer than all else here
if TYPE_CHECKING:
    from ssd_jax.config import ModelConfig as ModelConfig
    from ssd_jax.cpu_clients import split_cpu as split_cpu
    from ssd_jax.drafting.ngram import NgramConfig as NgramConfig
    from ssd_jax.engine.round_times import measure_round_times as measure_round_times
    from ssd_jax.engine.speculation import Speculation as Speculation
    from ssd_jax.engine.ssd_options import SSD as SSD
    from ssd_jax.errors import SsdJaxError as SsdJaxError
    from ssd_jax.fan_out import FanOut as FanOut
    from ssd_jax.generation import Completion as Completion
    from ssd_jax.generation import Delta as Delta
    from ssd_jax.generation import generate as generate
    from ssd_jax.generation import stream as stream
    from ssd_jax.model import Model as Model
    from ssd_jax.model import load_model as load_model
    from ssd_jax.placement import place_model as place_model
    from ssd_jax.placement import repeat_model as repeat_model
    from ssd_jax.placement import shard_model as shard_model
    from ssd_jax.sampling_params import SamplingParams as SamplingParams

_HOMES = {
    "Completion": "generation",
    "Delta": "generation",
    "Model": "model",
    "ModelConfig": "config",
    "FanOut": "fan_out",
    "SSD": "engine.ssd",
    "place_model": "placement",
    "repeat_model": "placement",
    "shard_model": "placement",
    "split_cpu": "cpu_clients",
    "SamplingParams": "sampling_params",
    "NgramConfig": "drafting.ngram",
    "Speculation": "engine.speculation",
    "SsdJaxError": "errors",
    "generate": "generation",
    "load_model": "model",
    "measure_round_times": "engine.round_times",
    "stream": "generation",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssd_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ssd_jax.{_HOMES[name]}"), name)
