import importlib.util
import itertools
import json
import threading

import numpy as np
import pytest
from speculation_cases import GREEDY, PROMPTS
from ssd_cases import BAD, FAIR, ssd, target

from ssd_jax.decoding.finish import Finish
from ssd_jax.generation import generate
from ssd_jax.timeline import picture
from ssd_jax.timeline.rounds import Stamps, lay_out, record_rounds, summarize
from ssd_jax.timeline.trace import DRAFT, TARGET, trace_json

MS = 10**6  # nanoseconds


def pipeline(num_rounds=12, propose=1, verify=8, prepare=5, gap=0, every_miss=4, start=70):
    """Stamps of rounds that take so many milliseconds, after each of which the host is late."""
    stamps, at = [], start
    for index in range(num_rounds):
        proposed = at + (propose if index % every_miss else 3 * propose)
        stamps.append(
            Stamps(
                # Without a gap the host is ahead by a round, as it is when it decodes.
                dispatched=int(at * MS) if gap or index == 0 else int((at - verify) * MS),
                proposed=int(proposed * MS),
                verified=int((proposed + verify) * MS),
                prepared=int((proposed + prepare) * MS),
            )
        )
        at = proposed + max(verify, prepare) + gap
    return stamps


def said(num_rounds=12, every_miss=4, ends=None, num_rows=1):
    """What such rounds said: every so many misses, as many accepted as the round's number."""
    ends = ends or {}
    messages, outcomes = [], []
    for index in range(num_rounds):
        hit = int(index % every_miss != 0)
        finish = [
            Finish.EOS if index >= ends.get(row, num_rounds) else Finish.RUNNING
            for row in range(num_rows)
        ]
        messages.append(np.array([[7, 7, 7, 3, hit]] * num_rows))
        outcomes.append(np.array([[index % 4, 9, code] for code in finish]))
    return messages, outcomes


def rounds_of(every_miss=4, **options):
    stamps = pipeline(every_miss=every_miss, **options)
    return lay_out(stamps, *said(every_miss=every_miss), num_rows=1)


def test_programs_begin_when_what_they_read_is_there():
    first, second, *_ = rounds_of()
    assert (first.propose.start, first.propose.end) == (0.0, 0.003)
    assert (first.verify.start, first.verify.end) == (0.003, 0.011)
    assert (first.prepare.start, first.prepare.end) == (0.003, 0.008)
    assert second.propose.start == 0.011  # not when it was dispatched, which was earlier
    late = rounds_of(gap=2)
    assert late[1].propose.start == 0.013  # dispatched after all else was there
    behind = rounds_of(prepare=10)
    assert behind[1].propose.start == behind[0].prepare.end == 0.013


def test_rows_that_ended_are_left_out_and_so_are_rounds_without_any():
    messages, outcomes = said(num_rows=3, ends={0: 2, 1: 5})
    stamps = pipeline()
    rounds = lay_out(stamps, messages, outcomes, num_rows=2)  # the third only fills the batch
    assert [[row.row for row in one.rows] for one in rounds] == [[0, 1]] * 3 + [[1]] * 3
    assert [one.rows[-1].num_accepted for one in rounds] == [0, 1, 2, 3, 0, 1]
    assert [one.is_hit for one in rounds] == [False, True, True, True, False, True]


def test_summary_of_a_pipeline_that_waits_for_nothing():
    summary = summarize(rounds_of())
    assert summary.num_rounds == 10
    assert summary.round_s == pytest.approx(0.009)
    assert summary.verify_s == pytest.approx(0.008)
    assert summary.prepare_s == pytest.approx(0.005)
    assert summary.hit_s == pytest.approx(0.001)
    assert summary.miss_s == pytest.approx(0.003)
    assert summary.overlap_efficiency is None
    assert summary.waiting_share == 0
    # Rounds 4 and 8 of 1 to 11 missed, both after a hit; rounds 1, 5 and 9 followed a miss.
    assert summary.hit_rate == pytest.approx(9 / 11)
    assert summary.hit_rate_after_hit == pytest.approx(6 / 8)
    assert summary.hit_rate_after_miss == 1
    assert summary.mean_accepted == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("round_takes", "efficiency"),
    [
        ({}, 1),
        ({"gap": 1}, 9 / 10),  # the host is late
        ({"gap": 9}, 1 / 2),
        ({"verify": 11}, 9 / 12),  # verification is slowed down by what runs beside it
    ],
)
def test_efficiency_is_what_the_programs_take_alone_over_the_round(round_takes, efficiency):
    alone = rounds_of()  # of 1 + max(8, 5) milliseconds
    summary = summarize(rounds_of(**round_takes), alone)
    assert summary.overlap_efficiency == pytest.approx(efficiency)


def test_a_round_seen_too_late_to_last_at_all_does_not_matter():
    """A thread that wakes up late may see a round begin and end at the same time."""
    stamps = pipeline()
    late = stamps[5].prepared + 1
    stamps[4] = Stamps(dispatched=0, proposed=late, verified=late, prepared=late)
    stamps[5] = Stamps(dispatched=0, proposed=late, verified=late, prepared=late)
    rounds = lay_out(stamps, *said(), num_rows=1)
    assert rounds[5].verify.seconds == 0
    assert summarize(rounds, rounds_of()).overlap_efficiency == pytest.approx(1)


def test_in_lockstep_preparation_begins_after_verification():
    stamps = [Stamps(dispatched=0, proposed=1 * MS, verified=9 * MS, prepared=14 * MS)]
    (one,) = lay_out(stamps, *said(1), num_rows=1, lockstep=True)
    assert (one.verify.start, one.verify.end) == (0.001, 0.009)
    assert (one.prepare.start, one.prepare.end) == (0.009, 0.014)


def test_summary_counts_rounds_that_wait_for_the_draft():
    assert summarize(rounds_of(prepare=9)).waiting_share == 1


def test_summary_of_too_few_rounds_is_none():
    assert summarize(rounds_of()[:2]) is None
    assert summarize(rounds_of()[:3]) is not None


@pytest.mark.parametrize("lockstep", [False, True])
def test_recorded_rounds_are_those_of_generate(lockstep):
    tick, lock = itertools.count(), threading.Lock()

    def clock():
        with lock:
            return next(tick)

    model, options = target(), ssd(FAIR)
    rounds = record_rounds(model, options, PROMPTS, GREEDY, lockstep=lockstep, clock=clock)
    completions = generate(model, PROMPTS, GREEDY, speculation=options)
    for row, completion in enumerate(completions):
        own = [entry for one in rounds for entry in one.rows if entry.row == row]
        counts = completion.speculation
        assert len(own) == counts.target_steps
        assert sum(entry.num_accepted for entry in own) == counts.total.num_accepted_tokens
        assert sum(entry.was_hit for entry in own) == sum(counts.lookups.hits)
    for one in rounds:
        assert one.propose.start <= one.propose.end == one.verify.start
        assert one.prepare.start == (one.verify.end if lockstep else one.propose.end)
        assert one.verify.start <= one.verify.end
        assert one.prepare.start <= one.prepare.end


def test_trace_is_one_process_with_a_thread_for_each_device_in_microseconds():
    trace = json.loads(trace_json(rounds_of()))
    names = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert names == {TARGET: "target", DRAFT: "draft"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 3 * 12
    assert {event["pid"] for event in spans} == {1}
    assert {event["name"] for event in spans if event["tid"] == TARGET} == {"verify"}
    for thread in names:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == thread)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(own))
    verify = next(event for event in spans if event["tid"] == TARGET)
    assert verify["ts"] == pytest.approx(3000)
    assert verify["dur"] == pytest.approx(8000)
    assert verify["args"] == {"round": 0, "prepared": [False], "accepted": [0]}


def test_picture_shows_what_changes():
    usual, other = ssd(FAIR), ssd(FAIR, draft_len=2, fan_out=2)
    pictures = [
        picture.timeline_png(rounds, options)
        for rounds, options in (
            (rounds_of(), usual),
            (rounds_of(verify=4), usual),
            (rounds_of(every_miss=2), usual),
            (rounds_of(), other),
            (rounds_of()[:1], usual),
        )
    ]
    assert all(content.startswith(b"\x89PNG") for content in pictures)
    assert len(set(pictures)) == len(pictures)
    assert pictures[0] == picture.timeline_png(rounds_of(), usual)


def test_without_matplotlib_a_picture_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(picture.ConfigError, match=r"needs matplotlib.*ssd-jax\[plot\].*\.json"):
        picture.timeline_png(rounds_of(), ssd(BAD))
