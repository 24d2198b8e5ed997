import json

import pytest

REPEATING = "the cat the cat the"


@pytest.fixture
def ssd(tiny_checkpoint, generate):
    """`generate --method ssd` with the tiny model as its own draft."""

    def call(*argv, prompt="the cat"):
        return generate(prompt, "--method", "ssd", "--draft-model", str(tiny_checkpoint), *argv)

    return call


@pytest.mark.parametrize("options", [(), ("--temperature", "0.9", "--seed", "3")])
def test_ssd_does_not_change_the_text(generate, ssd, options):
    outcome = ssd(*options)
    assert outcome.code == 0
    assert outcome.out == generate("the cat", *options).out
    assert "tokens drafted by prepared accepted" in outcome.err


def test_statistics_say_what_was_found(generate, ssd):
    answer, plain = json.loads(ssd("--json").out), json.loads(generate("the cat", "--json").out)
    assert answer["token_ids"] == plain["token_ids"]
    counts = answer["speculation"]
    # Twelve tokens are two rounds of four drafted ones and a bonus token, then two more tokens.
    assert counts["target_steps"] == 3
    lookups = counts["lookups"]
    assert lookups["lookups"] == lookups["hits"] == [1, 1]
    assert lookups["accepted"] == [[0, 0, 0, 0, 1], [0, 1, 0, 0, 1]]
    for kind in (0, 1):  # found by the first of three guesses after the whole draft
        assert lookups["found_at"][kind] == [0] * 12 + [1, 0, 0]
    assert counts["drafters"]["fallback"]["num_drafts"] == 1
    assert counts["drafters"]["prepared"]["num_draft_tokens"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0, 1])
def test_synthetic_hits_come_as_asked(ssd, rate):
    options = ("--synthetic-acceptance", "0.5", "--synthetic-hit-rate", str(rate))
    lookups = json.loads(ssd("--json", *options).out)["speculation"]["lookups"]
    assert sum(lookups["hits"]) == rate * sum(lookups["lookups"])
    assert sum(lookups["lookups"]) > 0


def test_fan_out_fallback_and_device_do_not_change_the_text(generate, ssd):
    plain = generate(REPEATING).out
    for options in (
        ("-k", "2", "--fan-out", "1,0,2", "--fan-out-after-miss", "4,0,0"),
        ("--fallback", "ngram", "--ngram-n", "1", "--fan-out", "2"),
        ("--draft-device", "same"),
        ("--verification", "rejection", "--miss-weight", "0.5"),
    ):
        assert ssd(*options, prompt=REPEATING).out == plain


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (("--fan-out", "2"), "--method ar guesses no outcomes: leave out --fan-out."),
        (("--fan-out-after-miss", "2,1"), "leave out --fan-out-after-miss."),
        (("--fallback", "ngram"), "guesses no outcomes: leave out --fallback."),
        (
            ("--method", "ngram", "--miss-weight", "0.5"),
            "--method ngram guesses no outcomes: leave out --miss-weight.",
        ),
        (("--method", "ssd"), "--method ssd needs --draft-model for a model of your own."),
        (("--method", "ssd", "--exact"), "has passes of one width anyway: leave out --exact."),
        (("--method", "ssd", "-k", "auto"), "takes a number: leave out --draft-len auto."),
        (("--method", "ssd", "--fallback", "random"), "--fallback"),
        (("--synthetic-hit-rate", "0.5"), "guesses no outcomes: leave out --synthetic-hit-rate."),
        (("--method", "ssd", "--fan-out", "2,many"), "--fan-out"),
    ],
)
def test_what_does_not_go_together_is_refused(generate, argv, fragment):
    outcome = generate("the cat", *argv)
    assert outcome.code == 2
    assert fragment in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (("-k", "2", "--fan-out", "1,2"), "for draft_len 2 has 3 numbers"),
        (("-k", "65"), "from 1 to 64"),
        (("--fan-out", "0"), "not all 0"),
        (("--fan-out", "999"), "at most as many tokens as the vocabulary has (128), got 999"),
        (("--miss-weight", "2", "--verification", "rejection"), "from 0 to 1, got 2.0"),
        (("--miss-weight", "0.5"), "only verification rejection knows"),
        (
            ("--verification", "greedy", "--temperature", "0.5"),
            "Greedy verification needs temperature 0",
        ),
    ],
)
def test_options_are_checked(ssd, argv, fragment):
    outcome = ssd(*argv)
    assert outcome.code == 2
    assert fragment in outcome.err
