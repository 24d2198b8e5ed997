import json

import pytest


@pytest.fixture
def draft(tiny_checkpoint, generate):
    """`generate` with the tiny model as its own draft."""

    def call(*argv):
        return generate("the cat", "--draft-model", str(tiny_checkpoint), *argv)

    return call


@pytest.mark.parametrize("options", [(), ("--temperature", "0.9", "--seed", "3")])
def test_a_draft_model_does_not_change_the_text(generate, draft, options):
    assert draft(*options).out == generate("the cat", *options).out


@pytest.mark.parametrize("kind", ["simple", "map", "mod"])
def test_ngrams_do_not_change_the_text(generate, kind):
    speculative = generate("the cat the cat the", "--method", "ngram", "--ngram-kind", kind)
    assert speculative.out == generate("the cat the cat the").out
    assert "drafted tokens accepted" in speculative.err


def test_statistics_say_how_much_was_accepted(draft):
    outcome = json.loads(draft("--json", "-k", "3").out)
    counts = outcome["speculation"]
    assert counts["accepted"] == 9  # all of three rounds of three, and three bonus tokens
    assert counts["target_steps"] == 3
    assert counts["acceptance_rate"] == 1
    assert "9 of 9 drafted tokens accepted (100%)" in draft("-k", "3").err


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (("--method", "draft"), "--draft-model"),
        (("--method", "ar", "--draft-model", "anywhere"), "--method ar uses no draft model"),
        (("--method", "ngram", "--ngram-n", "65"), "n of n-gram drafting must be from 1 to 64"),
        (("--draft-model", "no such folder"), "no such folder"),
    ],
)
def test_what_does_not_go_together_is_refused(generate, argv, fragment):
    outcome = generate("the cat", *argv)
    assert outcome.code == 2
    assert fragment in outcome.err


def test_draft_len_is_checked(draft):
    outcome = draft("-k", "65")
    assert outcome.code == 2
    assert "draft_len must be from 1 to 64" in outcome.err
