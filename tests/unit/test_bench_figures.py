import statistics

import pytest
from bench_cases import LOOKUPS, counts, sample, unit
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import quantiles, spread, summarise

seconds = st.floats(0.125, 8)


def test_speed_is_of_the_median_round_and_over_all_batches():
    slow, fast = (8.0, 8.0, 9.0), (1.0, 0.5, 8.0)
    figures = summarise([unit(fast=sample(fast)), unit(fast=sample(slow))])
    assert figures["ar"]["decode_tokens_per_s"] == 20 / (2 + 2)
    assert figures["ar"]["decode_ratio_to_ar"] == 1
    assert figures["fast"]["decode_tokens_per_s"] == 20 / (1 + 8)
    assert figures["fast"]["decode_ratio_to_ar"] == pytest.approx(4 / 9)
    assert figures["fast"]["decode_ratio_spread"] == [0.25, 1.125, 2]
    assert figures["fast"]["decode_cpus_busy"] == 2
    over_rounds = [4 / 9, 2 / 8.5, 8 / 17]
    assert figures["fast"]["decode_ratio_spread_over_rounds"] == pytest.approx(
        [min(over_rounds), statistics.median(over_rounds), max(over_rounds)]
    )


@given(own=st.lists(seconds, min_size=1, max_size=4), plain=seconds, scale=st.sampled_from([2, 8]))
def test_ratios_do_not_depend_on_the_machine(own, plain, scale):
    def ratio(by):
        batch = unit(one=sample([by * s for s in own]), ar=sample([by * plain] * len(own)))
        return summarise([batch])["one"]["decode_ratio_to_ar"]

    assert ratio(scale) == pytest.approx(ratio(1))


def test_latency_figures():
    figures = summarise([unit(), unit(ar=sample(prefill_s=[1.0, 2.0, 9.0]))])["ar"]
    assert figures["prefill_s_spread"] == [0.25, 1.125, 2]
    assert figures["first_token_s_spread"] == [0.75, 1.625, 2.5]
    assert figures["gap_s"] == {"median": pytest.approx(0.3), "p95": 0.4, "max": 0.4}
    assert figures["tokens_per_delivery"] == pytest.approx(10 / 3)
    assert (figures["compile_s"], figures["peak_bytes"]) == (1, {"resident": 100, "device": None})


def test_acceptance_is_of_all_batches_together():
    one = counts({"draft": (4, 10, (4, 2))}, target_steps=5)
    other = counts({"draft": (1, 2, (0, 0))}, target_steps=5)
    units = [unit(draft=sample(speculation=one)), unit(draft=sample(speculation=other))]
    figures = summarise(units)["draft"]
    assert figures["tokens_per_target_step"] == 2
    assert figures["drafters"]["draft"] == {
        "rounds_with_a_draft": 0.5,
        "num_draft_tokens": 12,
        "num_accepted_tokens": 6,
        "acceptance_rate": 0.5,
        "accepted_per_draft": 1.2,
        "accepted_at_position": [0.8, 0.4],
    }
    assert summarise(units)["ar"]["tokens_per_target_step"] == 1


def test_a_drafter_that_never_drafted_has_no_rates():
    speculation = counts({"ngram": (0, 0, (0, 0))})
    figures = summarise([unit(ngram=sample(speculation=speculation))])["ngram"]
    own = figures["drafters"]["ngram"]
    assert own["acceptance_rate"] is own["accepted_at_position"] is None


def test_hits_of_all_batches_together():
    speculation = counts({"prepared": (4, 8, (3, 2))}, lookups=LOOKUPS)
    figures = summarise([unit(ssd=sample(speculation=speculation))] * 2)["ssd"]
    assert figures["hit_rate"] == 12 / 16
    assert figures["hit_rate_after_miss_and_hit"] == [0.5, 5 / 6]
    assert figures["outcomes"]["accepted"] == [[2, 2, 0], [4, 4, 4]]
    assert figures["outcomes"]["hits_by_rank"][1] == [[4, 2], [2, 0], [2, 0]]


def test_host_figures_are_there_if_the_host_was_timed():
    timed = sample((2.0,) * 3, generate_s=[3.0], stream_s=[4.0])
    assert "stream_host_share_spread" not in summarise([unit(one=timed), unit(one=sample())])["one"]
    figures = summarise([unit(one=timed)])["one"]
    assert figures["stream_host_share_spread"] == [1 / 3] * 3
    assert figures["request_host_s_spread"] == [0.75] * 3


@given(values=st.lists(seconds, min_size=1, max_size=60))
def test_spread_and_quantiles_are_in_order(values):
    low, median, high = spread(values)
    found = quantiles(values)
    assert low == min(values) <= median <= found["p95"] <= found["max"] == high == max(values)
    assert sum(value <= found["p95"] for value in values) >= 0.95 * len(values)
    assert quantiles([]) == {"median": None, "p95": None, "max": None}
