"""Every sampling option under SSD, a row each: it works as in plain decoding, or is refused."""

import itertools

import pytest
from speculation_cases import assert_same_outputs
from test_option_matrix import BASE, PROMPT, ROWS, as_params, cases, pair, plain, respects

from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import RequestError
from ssd_jax.generation import generate

EVERY = list(
    itertools.product(("coupled", "rejection", "greedy"), ("neural", "ngram"), (3, (0, 4, 0, 0, 2)))
)
FAST = {("coupled", "neural", 3)}


@pytest.mark.parametrize(
    ("verification", "fallback", "fan_out"),
    [pytest.param(*each, marks=() if each in FAST else pytest.mark.slow) for each in EVERY],
)
def test_every_option_works_or_is_refused(verification, fallback, fan_out):
    model, draft = pair()
    weight = 0.5 if verification == "rejection" else 1.0
    options = SSD(
        draft=draft,
        fallback=fallback,
        fan_out=fan_out,
        verification=verification,
        miss_weight=weight,
    )
    alone = [((name, value),) for name, value in cases().items()]
    fixed = [(("top_k", 1), *entry) for entry in alone]
    if verification == "greedy":
        with pytest.raises(RequestError, match=r"Greedy verification .* temperature 0\.8"):
            generate(model, [PROMPT], BASE, speculation=options)
        fixed = [(*entry, ("temperature", 0.0)) for entry in alone]
    fixed = (*fixed, *fixed[: ROWS - len(fixed)])
    completions = generate(model, [PROMPT] * ROWS, list(map(as_params, fixed)), speculation=options)
    assert_same_outputs(completions, plain(fixed))
    if verification == "greedy":
        return
    free = (*alone, *[(("max_tokens", 20 + row),) for row in range(ROWS - len(alone))])
    completions = generate(model, [PROMPT] * ROWS, list(map(as_params, free)), speculation=options)
    if verification == "coupled":
        assert_same_outputs(completions, plain(free))
    for ((name, value),), completion in zip(free, completions, strict=True):
        assert respects(name, value, completion), name
