import itertools

import pytest
from tiny_models import tiny

from bench import micro_parts
from bench.micro import measure_part
from bench.micro_parts import PARTS, Pair, Part


def test_measure_part_leaves_the_first_turn_out_and_takes_turns():
    order, clock = [], itertools.count(1)

    def contestant(name):
        def run():
            order.append(name)
            return float(next(clock))

        return run

    part = Part(what="w", axis="a", contestants={"x": contestant("x"), "y": contestant("y")})
    assert measure_part(part, 3) == {
        "what": "w",
        "axis": "a",
        "results": [
            {"at": "x", "median_s": 5.0, "min_s": 3.0, "max_s": 7.0},
            {"at": "y", "median_s": 6.0, "min_s": 4.0, "max_s": 8.0},
        ],
    }
    assert order == ["x", "y"] * 4


@pytest.fixture
def small(monkeypatch):
    """Parts that are quick to measure, for a pair of tiny models."""
    for name, value in {
        "WIDTHS": (1, 2),
        "BRANCHES": (1, 2),
        "LEAVES": (1, 3),
        "VOCABULARY": 512,
        "CONTEXT": 1024,
        "CHAIN": 2,
        "LOOPS": 2,
    }.items():
        monkeypatch.setattr(micro_parts, name, value)
    model = tiny("llama").model
    return Pair(target=model, draft=model, turns=2)


@pytest.mark.parametrize("name", sorted(set(PARTS) - {"ngram"}))
def test_every_part_is_timed(name, small):
    part = measure_part(PARTS[name](small), 1)
    assert len(part["results"]) >= 2
    for result in part["results"]:
        assert 0 < result["min_s"] <= result["median_s"] <= result["max_s"]


@pytest.mark.slow
def test_ngrams_are_timed(small):
    part = measure_part(PARTS["ngram"](small), 1)
    assert [result["at"] for result in part["results"]] == ["no drafting", "simple", "map", "mod"]
