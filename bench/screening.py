"""From a workload to the requests that are measured."""

import dataclasses
from collections.abc import Sequence

from bench.prompt_sets import encode_prompt
from bench.workloads import Workload, repeated_share
from ssd_jax import Model, SamplingParams, generate
from ssd_jax.errors import RequestError

SCREENED_AT_ONCE = 8  # prompts whose plain answers are looked at together
MAX_SCREENED = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request: its ids and its options."""

    ids: tuple[int, ...]
    params: SamplingParams


def choose_prompts(
    target: Model, workload: Workload, temperature: float, num_prompts: int, max_tokens: int
) -> tuple[list[Prompt], int]:
    """The first prompts that fit and are as repetitive as the workload wants, and how many not.

    Raises:
        RequestError: there are none.
    """
    kept: list[Prompt] = []
    num_dropped = 0
    candidates = _fitting(target, workload, temperature, max_tokens)
    for start in range(0, len(candidates), SCREENED_AT_ONCE):
        chunk = candidates[start : start + SCREENED_AT_ONCE]
        for prompt, fits in zip(chunk, _repeat_enough(target, workload, chunk), strict=True):
            if fits:
                kept.append(prompt)
            else:
                num_dropped += 1
            if len(kept) == num_prompts:
                return kept, num_dropped
    if not kept:
        raise RequestError(
            f"No prompt of {workload.name} fits {target.config.max_context} tokens with "
            f"{max_tokens} for the answer and repeats {workload.min_repeated:.0%} of it: lower "
            "--max-tokens or choose other prompts."
        )
    return kept, num_dropped


def _fitting(
    target: Model, workload: Workload, temperature: float, max_tokens: int
) -> list[Prompt]:
    """Candidates that the target's context holds together with the answer."""
    found: list[Prompt] = []
    for text in workload.prompts:
        ids = encode_prompt(target, workload, text)
        if ids and len(ids) + max_tokens <= target.config.max_context:
            params = SamplingParams(
                max_tokens=max_tokens, temperature=temperature, seed=len(found), ignore_eos=True
            )
            found.append(Prompt(ids=ids, params=params))
        if len(found) == MAX_SCREENED:
            break
    return found


def _repeat_enough(target: Model, workload: Workload, chunk: Sequence[Prompt]) -> list[bool]:
    if workload.min_repeated == 0:
        return [True] * len(chunk)
    answers = generate(
        target, [prompt.ids for prompt in chunk], [prompt.params for prompt in chunk]
    )
    return [
        repeated_share(prompt.ids, answer.token_ids) >= workload.min_repeated
        for prompt, answer in zip(chunk, answers, strict=True)
    ]
