"""Raw numbers of a benchmark as `bench.measuring` gives them, chosen so that figures are round."""


def sample(decode_s=(2.0, 1.0, 4.0), num_tokens=10, speculation=None, **changes):
    """One method on one batch of prompts."""
    usual = {
        "compile_s": 0.5,
        "peak_bytes": {"resident": 100, "device": None},
        "num_tokens": num_tokens,
        "num_differing": 0,
        "speculation": speculation,
        "prefill_s": [0.25] * len(decode_s),
        "first_step_s": [0.5] * len(decode_s),
        "decode_s": list(decode_s),
        "decode_cpu_s": [2 * seconds for seconds in decode_s],
        "deliveries": [[0.1, 1], [0.2, 4], [0.4, 5]],
    }
    return {**usual, **changes}


def counts(drafters, target_steps=5, lookups=None):
    """What speculation did: of each drafter (drafts, drafted, accepted at each position)."""
    return {
        "target_steps": target_steps,
        "drafters": {
            name: {
                "num_drafts": drafts,
                "num_draft_tokens": drafted,
                "num_accepted_tokens": sum(per_pos),
                "num_accepted_tokens_per_pos": list(per_pos),
            }
            for name, (drafts, drafted, per_pos) in drafters.items()
        },
        "lookups": lookups,
    }


LOOKUPS = {
    "lookups": [2, 6],
    "hits": [1, 5],
    "accepted": [[1, 1, 0], [2, 2, 2]],
    "hits_by_rank": [[[1, 0], [0, 0], [0, 0]], [[2, 1], [1, 0], [1, 0]]],
}


def unit(**methods):
    """A batch of one prompt; of each method its sample."""
    return {
        "prompt_tokens": [7],
        "repeated_share": [0.5],
        "methods": {"ar": sample(), **methods},
    }


def fake_unit(names, decode_s):
    """A batch of one prompt on which the named methods took so long, drafts and hits included."""
    samples = {}
    for name in names:
        speculation = None
        if name.startswith("ssd"):
            speculation = counts(
                {"prepared": (4, 8, (3, 2)), "fallback": (1, 2, (1, 0))}, 5, LOOKUPS
            )
        elif name != "ar":
            speculation = counts({name.partition(":")[0]: (4, 8, (3, 2))})
        samples[name] = sample((decode_s, decode_s * 1.5), speculation=speculation)
    return {"prompt_tokens": [7], "repeated_share": [0.5], "methods": samples}


TIMELINE = {
    "summary": {
        "num_rounds": 3,
        "round_s": 0.004,
        "hit_s": 0.0001,
        "miss_s": None,
        "verify_s": 0.003,
        "prepare_s": 0.002,
        "overlap_efficiency": 0.9,
    },
    "rounds": [
        {
            "propose": (0.004 * n, 0.004 * n + 0.0005),
            "verify": (0.004 * n + 0.0005, 0.004 * n + 0.003),
            "prepare": (0.004 * n + 0.0005, 0.004 * n + 0.0025),
            "is_hit": n % 2 == 0,
            "accepted": [n],
        }
        for n in range(4)
    ],
}
