import pytest
from bench_cases import TIMELINE

from bench.guard import (
    HOST,
    LIMITS,
    OVERLAP,
    SPECULATION,
    SSD,
    judge,
    loosened,
    ratios,
    read_limits,
)


def record(**speeds):
    methods = {name: {"decode_ratio_to_ar": speed} for name, speed in speeds.items()}
    methods["ar"] = {"decode_ratio_to_ar": 1.0, "stream_host_share_spread": [0.0, 0.1, 0.2]}
    cell = {
        "workload": "code",
        "temperature": 0.0,
        "batch": 1,
        "units": [{}],
        "methods": methods,
        "timelines": {"ssd": TIMELINE} if "ssd" in speeds else {},
    }
    return {"cells": [cell, {**cell, "workload": "unmeasured", "units": []}]}


def test_ratios_are_of_the_best_of_each_kind():
    (found,) = ratios(record(draft=1.5, ngram=2.0, ssd=1.8, wide=9.0)).values()
    assert found == {SPECULATION: 2.0, SSD: 0.9, OVERLAP: 0.9, HOST: 0.1}
    assert ratios(record()) == {"code, T 0, batch 1": {HOST: 0.1}}


def test_a_ratio_that_fell_is_told():
    before, now = ratios(record(draft=2.0, ssd=2.0)), ratios(record(draft=1.7, ssd=1.7))
    kept = {one.ratio: one.is_kept for one in judge(now, loosened(before, 0.1))}
    assert kept == {SPECULATION: False, SSD: True, OVERLAP: True, HOST: True}
    assert all(one.is_kept for one in judge(now, loosened(before, 0.2)))
    assert all(one.is_kept for one in judge(before, loosened(before, 0.0)))


def test_the_share_of_the_host_must_not_rise():
    (cell,) = found = {"cell": {HOST: 0.3}}
    assert not next(judge(found, loosened({cell: {HOST: 0.2}}, 0.05))).is_kept
    assert next(judge(found, loosened({cell: {HOST: 0.26}}, 0.05))).is_kept
    assert list(judge(found, {"other": {HOST: 1.0}})) == []


def test_limits_are_of_ratios_that_there_are():
    assert set(read_limits(LIMITS)) == {SPECULATION, SSD, OVERLAP, HOST}


@pytest.mark.parametrize("ratio", [SPECULATION, HOST])
def test_limits_themselves_are_kept(ratio):
    limit = read_limits(LIMITS)[ratio]
    assert next(judge({"cell": {ratio: limit}}, {"cell": {ratio: limit}})).is_kept
