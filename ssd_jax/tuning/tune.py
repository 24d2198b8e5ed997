"""Measuring, choosing, and measuring again what was chosen."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import get_args

from ssd_jax.engine.ssd_options import SSD, Fallback
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.tuning.measuring import (
    MISS_WEIGHTS,
    measure_behaviour,
    measure_setting,
    measure_times,
)
from ssd_jax.tuning.speed import Behaviour, Prediction, Setting, Times, choose, predict_all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuning:
    """What was measured, what it predicts, and the choice with the outcomes it was seen to have."""

    times: Times
    behaviours: dict[Fallback, Behaviour]
    predictions: tuple[Prediction, ...]
    best: Prediction


def tune(
    model: Model,
    ssd: SSD,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams,
    *,
    batch_size: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> Tuning:
    """The fastest options for these models on their devices, for prompts and sampling like these.

    Of `ssd` the draft, the n-grams and the verification count. The best setting with each fallback
    is decoded with before one of them is chosen, because what follows a miss depends on how many
    guesses there were. Under rejection sampling several miss weights are tried with the winner.
    """
    tell("timing the parts of a round")
    times = measure_times(model, ssd, params, batch_size=batch_size)
    behaviours: dict[Fallback, Behaviour] = {}
    for fallback in get_args(Fallback):
        tell(f"decoding {len(prompts)} prompts with the {fallback} fallback")
        behaviours[fallback] = measure_behaviour(model, ssd, prompts, params, fallback)
    predictions = predict_all(times, behaviours, batch_size)

    def fastest(settings: Sequence[Setting]) -> Prediction:
        seen = []
        for setting in settings:
            tell(
                f"decoding with draft_len {setting.draft_len}, {setting.fan_out.num_branches} "
                f"outcomes, the {setting.fallback} fallback, miss_weight {setting.miss_weight:g}"
            )
            seen.append(
                measure_setting(model, ssd, setting, times, prompts, params, batch_size=batch_size)
            )
        return choose(seen)

    best = fastest(
        [
            choose(one for one in predictions if one.setting.fallback == fallback).setting
            for fallback in behaviours
        ]
    )
    if ssd.verification == "rejection" and params.temperature > 0:
        weights = (1.0, *MISS_WEIGHTS)
        best = fastest(
            [dataclasses.replace(best.setting, miss_weight=weight) for weight in weights]
        )
    return Tuning(times=times, behaviours=behaviours, predictions=tuple(predictions), best=best)
