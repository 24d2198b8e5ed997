"""The sampling that a checkpoint's authors recommend, from its generation_config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssd_jax.errors import CheckpointError, RequestError, shown
from ssd_jax.sampling_params import SamplingParams

FILE = "generation_config.json"
# What the file calls it is what `SamplingParams` calls it; the values that mean "off".
_LAW = {"temperature": (), "top_k": (0, -1), "top_p": (), "min_p": ()}
# Fields that would change an output, and the values at which they do not.
_UNUSED: dict[str, tuple[object, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_new_tokens": (),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecommendedSampling:
    """What a generation_config.json asks for.

    Attributes:
        options: by the names of `SamplingParams`; without those that the file leaves out.
        unused: fields of the file that change outputs elsewhere and have no counterpart here.
    """

    options: Mapping[str, Any]
    unused: tuple[str, ...]


def recommended_sampling(config: Mapping[str, Any]) -> RecommendedSampling:
    """The sampling in the object of a generation_config.json; empty for an empty one.

    `do_sample: false` is greedy. Where the file does not say, it samples if it gives a temperature
    or a cut, as in vLLM (transformers would ignore them and warn). Nothing is taken over that the
    file does not hold: with transformers, `do_sample: true` alone also means top_k 50.

    Raises:
        CheckpointError: a field of another type or out of range.
    """
    given = {name: value for name, value in config.items() if value is not None}
    do_sample = given.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise _malformed("do_sample", "true or false", do_sample)
    law = {name: given[name] for name in _LAW if name in given}
    options: dict[str, Any] = {
        name: 0 if _is_one_of(value, _LAW[name]) else value for name, value in law.items()
    }
    _check(options, law)
    if do_sample is False:
        options = {"temperature": 0.0}
    elif do_sample or options:
        options = {"temperature": 1.0, **options}
    penalty = {name: given[name] for name in ("repetition_penalty",) if name in given}
    _check(penalty, penalty)
    unused = [
        name
        for name, neutral in _UNUSED.items()
        if name in given and not _is_one_of(given[name], neutral)
    ]
    return RecommendedSampling(options=options | penalty, unused=tuple(unused))


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    return not isinstance(value, bool) and value in neutral


def _check(options: Mapping[str, Any], stated: Mapping[str, object]) -> None:
    """Refuse the first option that `SamplingParams` refuses."""
    for name, value in options.items():
        try:
            dataclasses.replace(SamplingParams(), **{name: value})
        except RequestError as error:
            words = str(error).removeprefix(f"{name} must be ").rpartition(", got ")[0]
            raise _malformed(name, words, stated[name]) from error


def _malformed(name: str, expected: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"Expected {name} in the model's {FILE} to be {expected}, got {shown(value)}; correct that "
        "entry, or pass --no-generation-config."
    )
