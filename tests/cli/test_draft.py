import json

import pytest

from ssd_jax.drafting.ngram import NgramConfig

REPEATING = "the cat the cat the"


@pytest.fixture
def draft(tiny_checkpoint, generate):
    """`generate` with the tiny model as its own draft."""

    def call(*argv, prompt="the cat"):
        return generate(prompt, "--draft-model", str(tiny_checkpoint), *argv)

    return call


@pytest.mark.parametrize("options", [(), ("--temperature", "0.9", "--seed", "3")])
def test_a_draft_model_does_not_change_the_text(generate, draft, options):
    assert draft(*options).out == generate("the cat", *options).out


@pytest.mark.parametrize("kind", ["simple", "map", "mod"])
def test_ngrams_do_not_change_the_text(generate, kind):
    speculative = generate(REPEATING, "--method", "ngram", "--ngram-kind", kind)
    assert speculative.out == generate(REPEATING).out
    assert "tokens drafted by ngram accepted" in speculative.err


def test_combined_drafting_does_not_change_the_text_and_counts_apart(generate, draft):
    outcome = draft("--method", "combined", "--ngram-n", "1", "--json", prompt=REPEATING)
    answer, plain = json.loads(outcome.out), json.loads(generate(REPEATING, "--json").out)
    assert answer["token_ids"] == plain["token_ids"]
    assert "tokens drafted by ngram accepted" in outcome.err
    assert "tokens drafted by draft accepted" in outcome.err
    drafters = answer["speculation"]["drafters"]
    assert set(drafters) == {"ngram", "draft"}
    assert drafters["ngram"]["num_draft_tokens"] > 0
    per_pos = drafters["ngram"]["num_accepted_tokens_per_pos"]
    assert len(per_pos) == NgramConfig().max_draft


def test_statistics_say_how_much_was_accepted(draft):
    outcome = json.loads(draft("--json", "-k", "3").out)
    counts = outcome["speculation"]
    assert counts["target_steps"] == 3
    assert counts["tokens_per_target_step"] == 4
    # All of three rounds of three, and three bonus tokens.
    assert counts["drafters"] == {
        "draft": {
            "num_drafts": 3,
            "num_draft_tokens": 9,
            "num_accepted_tokens": 9,
            "num_accepted_tokens_per_pos": [3, 3, 3],
            "num_emitted_tokens": 12,
            "acceptance_rate": 1,
        }
    }
    err = draft("-k", "3").err
    assert "9 of 9 tokens drafted by draft accepted (100%), 4.00 tokens a target step" in err


def test_draft_lengths_chosen_from_measured_times_do_not_change_the_text(generate, draft):
    outcome = draft("-k", "auto", "--json")
    answer, plain = json.loads(outcome.out), json.loads(generate("the cat", "--json").out)
    assert answer["token_ids"] == plain["token_ids"]
    own = answer["speculation"]["drafters"]["draft"]
    assert len(own["num_accepted_tokens_per_pos"]) == 8


def test_exact_mode_says_what_it_costs(generate, draft):
    speculative, alone = draft("--exact", "-k", "3"), generate("the cat", "--exact", "-k", "3")
    plain = generate("the cat")
    assert speculative.out == alone.out == plain.out
    for outcome in (speculative, alone):
        assert "exact: every pass takes 4 tokens, " in outcome.err
        assert " times as long as a pass of one (" in outcome.err
    assert "1.00 tokens a target step" in alone.err
    assert "exact" not in plain.err
    assert draft("--exact", "-k", "3", "--quiet").err == ""


@pytest.mark.parametrize(("rate", "accepted"), [("0", 0), ("1", 9)])
def test_synthetic_acceptance_says_how_much_stands(draft, rate, accepted):
    outcome = draft("--synthetic-acceptance", rate, "-k", "3", "--json")
    own = json.loads(outcome.out)["speculation"]["drafters"]["draft"]
    assert own["num_accepted_tokens"] == accepted


def test_greedy_verification_does_not_change_the_text(generate, draft):
    assert draft("--verification", "greedy").out == generate("the cat").out


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (("--method", "draft"), "--method draft needs --draft-model"),
        (("--method", "combined"), "--method combined needs --draft-model"),
        (("--method", "ar", "--draft-model", "anywhere"), "--method ar uses no draft model"),
        (("--method", "ngram", "--draft-model", "any"), "--method ngram uses no draft model"),
        (
            ("--method", "ngram", "--ngram-n", "65"),
            "n of n-gram drafting must be a whole number from 1 to 64",
        ),
        (("--draft-model", "no such folder"), "no such folder"),
        (("--synthetic-acceptance", "0.5"), "--method ar drafts nothing"),
        (
            ("--method", "ngram", "--synthetic-acceptance", "1.5"),
            "synthetic_acceptance must be a finite float32 number from 0 to 1 or None, got 1.5",
        ),
        (
            ("--method", "ngram", "--verification", "greedy", "--temperature", "0.5"),
            "Greedy verification needs temperature 0, got a request of temperature 0.5",
        ),
        (("--method", "ngram", "--exact", "-k", "auto"), "leave out round_times or exact"),
        (("--method", "ngram", "-k", "several"), "-k/--draft-len"),
    ],
)
def test_what_does_not_go_together_is_refused(generate, argv, fragment):
    outcome = generate("the cat", *argv)
    assert outcome.code == 2
    assert fragment in outcome.err


@pytest.mark.parametrize("method", ["draft", "ngram", "combined"])
@pytest.mark.parametrize("draft_len", ["0", "65"])
def test_draft_len_is_checked(generate, tiny_checkpoint, method, draft_len):
    argv = () if method == "ngram" else ("--draft-model", str(tiny_checkpoint))
    outcome = generate("the cat", "--method", method, "-k", draft_len, *argv)
    assert outcome.code == 2
    assert "from 1 to 64" in outcome.err
