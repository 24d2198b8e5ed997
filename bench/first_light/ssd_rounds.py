"""SSD with the target on the GPU and the draft on the host's CPU, beside synchronous speculation.

The models are random, so acceptance and hits are made up (`synthetic_acceptance`,
`synthetic_hit_rate`): rounds cost what they cost, the text means nothing.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax

from bench.first_light.decoding import random_model, some_prompt
from bench.timing import time_parts
from ssd_jax import SSD, Model, SamplingParams, Speculation
from ssd_jax.engine.batch import make_requests
from ssd_jax.engine.ssd import open_programs, play_round
from ssd_jax.generation import choose_method
from ssd_jax.placement import place_model
from ssd_jax.timeline.picture import timeline_png
from ssd_jax.timeline.rounds import record_rounds, summarize

ACCEPTANCE, HIT_RATE = 0.8, 0.8
# Goals: of a round beside the longer of its two programs, of SSD beside synchronous speculation.
ROUND_GOAL, RATIO_GOAL = 1.05, 1.3
_REPEATS = 3

type Tell = Callable[..., None]


def compare(
    *, tell: Tell, dry_run: bool, size: str, draft_size: str, draft_lens: list[int]
) -> None:
    """Tokens a second of plain, synchronous and SSD decoding; rounds beside their programs.

    Synchronous speculation has its draft on the target's device, where it is fastest.
    """
    new_tokens = 24 if dry_run else 192
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=0)
    target, draft = random_model(size), random_model(draft_size, seed=1)
    far = place_model(draft, jax.devices("cpu")[-1])
    prompt = some_prompt(target.config)

    def rate(speculation: Speculation | SSD | None) -> float:
        time_parts(target, [prompt], [params], speculation)
        times = [time_parts(target, [prompt], [params], speculation) for _ in range(_REPEATS)]
        return (new_tokens - 1) / statistics.median(one.decode_s for one in times)

    plain = best = rate(None)
    tell("plain", f"{plain:.1f} tokens/s", tokens_per_s=plain)
    for draft_len in draft_lens:
        found = rate(Speculation(draft=draft, draft_len=draft_len, synthetic_acceptance=ACCEPTANCE))
        best = max(best, found)
        tell(
            f"synchronous, draft {draft_size} on the same device, k={draft_len}",
            f"{found:.1f} tokens/s, {found / plain:.2f}x plain",
            tokens_per_s=found,
        )
        ssd = SSD(
            draft=far,
            draft_len=draft_len,
            fan_out=1,
            synthetic_acceptance=ACCEPTANCE,
            synthetic_hit_rate=HIT_RATE,
        )
        found = rate(ssd)
        what = f"SSD, draft {draft_size} on the CPU, k={draft_len}"
        tell(
            what,
            f"{found:.1f} tokens/s, {found / plain:.2f}x plain, {found / best:.2f}x the best "
            f"synchronous so far (goal {RATIO_GOAL})",
            tokens_per_s=found,
            ratio=found / best,
        )
        _rounds(tell, what, target, ssd, prompt, params)


def _rounds(
    tell: Tell, what: str, target: Model, ssd: SSD, prompt: list[int], params: SamplingParams
) -> None:
    """How long rounds take beside their programs, and what dispatching them costs the host."""
    free, lockstep = (
        record_rounds(target, ssd, [prompt], params, lockstep=lockstep)
        for lockstep in (False, True)
    )
    summary, apart = summarize(free, lockstep), summarize(lockstep)
    if summary is None or apart is None:
        tell(what, "too few rounds to say anything", ok=False)
        return
    longer = max(apart.verify_s, apart.prepare_s)
    tell(
        f"{what}: rounds",
        f"{summary.round_s * 1e3:.2f} ms, {summary.round_s / longer:.2f}x the longer of verify "
        f"{apart.verify_s * 1e3:.2f} and prepare {apart.prepare_s * 1e3:.2f} ms (goal "
        f"{ROUND_GOAL}); hits {summary.hit_rate:.0%}; {summary.mean_accepted:.2f} accepted",
        summary=dataclasses.asdict(summary),
        lockstep=dataclasses.asdict(apart),
    )
    method, batch = choose_method(target, make_requests(target, [prompt], [params]), ssd)
    run, programs = method.prefill(batch), open_programs(target, ssd)
    run = jax.block_until_ready(play_round(programs, run))
    started, rounds = time.thread_time(), 8
    for _ in range(rounds):
        run = play_round(programs, run)
    spent = (time.thread_time() - started) / rounds
    jax.block_until_ready(run)
    tell(f"{what}: dispatch", f"{spent * 1e3:.2f} ms of CPU a round", seconds=spent)
    folder = os.environ.get("FIRST_LIGHT_OUT")
    if folder is not None:
        name = "timeline_" + what.replace(",", "").replace(" ", "_").replace("=", "") + ".png"
        Path(folder, name).write_bytes(timeline_png(free, ssd, lockstep))
        tell(f"{what}: timeline", name)
