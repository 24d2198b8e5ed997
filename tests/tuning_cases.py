"""Times and tuned files that tests of tuning share."""

import math

from ssd_jax.tuning.speed import Times
from ssd_jax.tuning.tuned_file import Choice, Expected, Measured, OutcomeFigures, Tuned


def times(verify_s=(0.01,) * 9, **changes):
    """Parts that take no time but for the verification, unless told."""
    still = {"lookup_s": 0.0, "neural_s": (0.0, 0.0), "ngram_s": 0.0, "prepare_s": (0.0, 0.0, 0.0)}
    return Times(verify_s=verify_s, **{**still, **changes})


def tuned():
    return Tuned(
        choice=Choice(
            draft_len=2,
            fan_out_after_hit=(3, 0, 2),
            fan_out_after_miss=(4, 1, 0),
            fallback="ngram",
            miss_weight=0.5,
        ),
        expected=Expected(
            hit_rate=0.8,
            tokens_per_round=2.5,
            round_s=0.0012,
            tokens_per_s=2083.0,
            autoregressive_tokens_per_s=1000.0,
            crossover_batch=math.inf,
        ),
        times=times(verify_s=(1e-3, 1.1e-05, 2e-3), prepare_s=(1e-4, 2e-5, 3e-6)),
        outcomes=OutcomeFigures(
            accepted_after_hit=(1, 2, 3),
            accepted_after_miss=(3, 2, 1),
            guesses_after_hit=(4, 2),
            guesses_after_miss=(3, 3),
        ),
        measured=Measured(
            date="2026-01-02",
            target='folder "of mine"\\é',
            draft="demo",
            target_devices="1 x cpu (cpu)",
            draft_devices="1 x cpu (cpu)",
            cpu_cores=2,
            jax="0.12",
            batch_size=1,
            verification="rejection",
            temperature=0.7,
            num_prompts=6,
        ),
    )
