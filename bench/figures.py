"""From the raw numbers of a record to the figures of its methods: pure functions over JSON."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Sample = Mapping[str, Any]


def summarise(units: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of every method over the batches of a cell; the first method is the baseline.

    Of the rounds the median counts. Spreads are [minimum, median, maximum], over batches or, where
    the name says so, over rounds.
    """
    names = list(units[0]["methods"])
    by_name = {name: [unit["methods"][name] for unit in units] for name in names}
    baseline = by_name[names[0]]
    return {name: _figures(samples, baseline) for name, samples in by_name.items()}


def _figures(samples: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, Any]:
    num_tokens = _total(samples, "num_tokens")
    decode_s, cpu_s = _medians(samples, "decode_s"), _medians(samples, "decode_cpu_s")
    speed, plain_speed = _speeds(samples), _speeds(plain)
    first_token_s = [
        statistics.median(map(sum, zip(one["prefill_s"], one["first_step_s"], strict=True)))
        for one in samples
    ]
    gaps = [gap for one in samples for gap, _ in one["deliveries"][1:]]
    delivered = [count for one in samples for _, count in one["deliveries"]]
    return {
        "decode_tokens_per_s": num_tokens / sum(decode_s),
        "decode_tokens_per_s_spread": spread(speed),
        "decode_ratio_to_ar": _ratio(samples, plain, "decode_s"),
        "decode_ratio_spread": spread(a / b for a, b in zip(speed, plain_speed, strict=True)),
        "decode_ratio_spread_over_rounds": spread(_ratio_of_rounds(samples, plain)),
        "decode_cpu_ratio_to_ar": _ratio(samples, plain, "decode_cpu_s"),
        "decode_cpus_busy": sum(cpu_s) / sum(decode_s),
        "prefill_s_spread": spread(_medians(samples, "prefill_s")),
        "first_token_s_spread": spread(first_token_s),
        "gap_s": quantiles(gaps),
        "tokens_per_delivery": statistics.fmean(delivered),
        "outputs_that_differ": _total(samples, "num_differing"),
        "compile_s": sum(one["compile_s"] for one in samples),
        "peak_bytes": {
            kind: max(sizes)
            if (sizes := _known(one["peak_bytes"][kind] for one in samples))
            else None
            for kind in ("resident", "device")
        },
        **_speculation_figures(samples, num_tokens),
        **_host_figures(samples),
    }


def _speculation_figures(samples: Sequence[Sample], num_tokens: int) -> dict[str, Any]:
    """Tokens a target step, acceptance of each drafter, and hits."""
    counts = [one["speculation"] for one in samples if one["speculation"] is not None]
    if not counts:
        return {"tokens_per_target_step": 1.0}
    steps = sum(one["target_steps"] for one in counts)
    drafters = {
        name: _drafter_figures([one["drafters"][name] for one in counts], steps)
        for name in counts[0]["drafters"]
    }
    figures = {"tokens_per_target_step": num_tokens / steps, "drafters": drafters}
    lookups = [one["lookups"] for one in counts if one["lookups"] is not None]
    return figures if not lookups else {**figures, **_hit_figures(lookups)}


def _drafter_figures(counts: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    drafts = _total(counts, "num_drafts")
    drafted = _total(counts, "num_draft_tokens")
    accepted = _total(counts, "num_accepted_tokens")
    per_pos = _add_lists([one["num_accepted_tokens_per_pos"] for one in counts])
    return {
        "rounds_with_a_draft": drafts / steps,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_per_draft": accepted / drafts if drafts else None,
        "accepted_at_position": [number / drafts for number in per_pos] if drafts else None,
    }


def _hit_figures(lookups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    looked_up = _add_lists([one["lookups"] for one in lookups])
    hits = _add_lists([one["hits"] for one in lookups])
    return {
        "hit_rate": sum(hits) / max(1, sum(looked_up)),
        "hit_rate_after_miss_and_hit": [
            hit / max(1, number) for hit, number in zip(hits, looked_up, strict=True)
        ],
        "outcomes": {
            "lookups": looked_up,
            "hits": hits,
            "accepted": [_add_lists([one["accepted"][kind] for one in lookups]) for kind in (0, 1)],
            "hits_by_rank": [
                [
                    _add_lists(rows)
                    for rows in zip(*(one["hits_by_rank"][kind] for one in lookups), strict=True)
                ]
                for kind in (0, 1)
            ],
        },
    }


def _host_figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the host takes, if it was timed.

    `stream_host_share` is the time that looking at the text adds, over the time that decoding then
    takes; `request_host_s` what `generate` takes besides prefill and decoding.
    """
    if any("stream_s" not in one for one in samples):
        return {}
    shares, requests = [], []
    for one in samples:
        prefill, decode, whole, streamed = (
            statistics.median(one[part])
            for part in ("prefill_s", "decode_s", "generate_s", "stream_s")
        )
        added = streamed - whole
        shares.append(added / (decode + added))
        requests.append(whole - prefill - decode)
    return {"stream_host_share_spread": spread(shares), "request_host_s_spread": spread(requests)}


def spread(values: Iterable[float]) -> list[float]:
    """Minimum, median and maximum."""
    listed = list(values)
    return [min(listed), statistics.median(listed), max(listed)]


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """Median, 95th percentile and maximum; None of nothing."""
    if not values:
        return {"median": None, "p95": None, "max": None}
    ordered = sorted(values)
    rank = max(0, -(-len(ordered) * 95 // 100) - 1)
    return {"median": statistics.median(ordered), "p95": ordered[rank], "max": ordered[-1]}


def _ratio(samples: Sequence[Sample], plain: Sequence[Sample], part: str) -> float:
    """Tokens a second of `part` over those of the baseline."""
    own = _total(samples, "num_tokens") / sum(_medians(samples, part))
    return own / (_total(plain, "num_tokens") / sum(_medians(plain, part)))


def _ratio_of_rounds(samples: Sequence[Sample], plain: Sequence[Sample]) -> list[float]:
    """The ratio of decode speeds in each round by itself."""

    def speeds(of: Sequence[Sample]) -> list[float]:
        seconds = zip(*(one["decode_s"] for one in of), strict=True)
        return [_total(of, "num_tokens") / sum(parts) for parts in seconds]

    return [own / other for own, other in zip(speeds(samples), speeds(plain), strict=True)]


def _speeds(samples: Sequence[Sample]) -> list[float]:
    return [
        one["num_tokens"] / seconds
        for one, seconds in zip(samples, _medians(samples, "decode_s"), strict=True)
    ]


def _medians(samples: Sequence[Sample], part: str) -> list[float]:
    return [statistics.median(one[part]) for one in samples]


def _total(samples: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(one[name] for one in samples)


def _known(values: Iterable[int | None]) -> list[int]:
    return [value for value in values if value is not None]


def _add_lists(lists: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*lists, strict=True)]
