"""What speculation refuses, and in which words."""

import dataclasses

import jax
import pytest
import tokenizers
from tiny_models import CONFIGS, make_tiny, prompt_ids, tiny, tiny_tokenizer
from tokenizers import models

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import RoundTimes, Speculation, check_pair, first_mismatch
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import ConfigError, RequestError
from ssd_jax.generation import generate, stream
from ssd_jax.placement import place_model
from ssd_jax.sampling_params import SamplingParams

NAME = "llama"


def model_with(tokenizer=None, **changes):
    """A tiny model without weights of its own: checks look at configuration and tokenizer only."""
    config = dataclasses.replace(CONFIGS[NAME], **changes)
    return dataclasses.replace(tiny(NAME).model, config=config, tokenizer=tokenizer)


def tokenizer_of(vocabulary):
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    return dataclasses.replace(tiny_tokenizer(), backend=backend)


@pytest.mark.parametrize("draft_len", [-1, 0, 65, 1000])
def test_draft_len_is_from_1_to_64(draft_len):
    with pytest.raises(RequestError, match=rf"draft_len .*1 to 64.* got {draft_len}\."):
        Speculation(draft=tiny(NAME).model, draft_len=draft_len)


@pytest.mark.parametrize("draft_len", [1, 64])
def test_the_shortest_and_the_longest_draft_are_taken(draft_len):
    assert Speculation(draft=tiny(NAME).model, draft_len=draft_len).draft_len == draft_len


@pytest.mark.parametrize("verification", ["greedy ", "", "Coupled", None])
def test_an_unknown_verification_is_refused_with_the_known_ones(verification):
    with pytest.raises(RequestError, match="coupled, rejection, greedy, got") as caught:
        Speculation(draft=tiny(NAME).model, verification=verification)
    assert repr(verification) in str(caught.value)


@pytest.mark.parametrize("run", [generate, stream])
def test_target_and_draft_on_different_devices_are_refused_before_anything_runs(run):
    devices = jax.devices()
    target, draft = (place_model(model_with(), device) for device in devices[:2])
    options = SamplingParams(max_tokens=2)
    with pytest.raises(ConfigError, match=r"same devices, got the target on .*0 .* on .*1: "):
        list(run(target, [[1]], options, speculation=Speculation(draft=draft)))
    together = Speculation(draft=place_model(draft, devices[0]))
    assert list(run(target, [[1]], options, speculation=together))


@pytest.mark.parametrize("kind", ["draft", "combined", "ssd", "ssd rejection"])
def test_a_draft_with_a_shorter_context_drafts_as_far_as_it_goes(kind):
    """Here the target itself: all it drafts is right, up to its 24th token and no further."""
    target = model_with()
    draft = dataclasses.replace(target, config=dataclasses.replace(target.config, max_context=24))
    prompts, options = [prompt_ids(8), prompt_ids(30)], SamplingParams(max_tokens=40, seed=0)
    match kind.split():
        case ["draft"]:
            speculation = Speculation(draft=draft)
        case ["combined"]:
            speculation = Speculation(draft=draft, ngram=NgramConfig(n=40))
        case ["ssd", *rest]:
            speculation = SSD(draft=draft, verification="rejection" if rest else "coupled")
    plain = generate(target, prompts, options)
    completions = generate(target, prompts, options, speculation=speculation)
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    first, second = (c.speculation for c in completions)
    assert first.total.num_accepted_tokens == first.total.num_draft_tokens == 13
    assert (first.target_steps, first.total.num_drafts) == (27, 4)
    assert (second.target_steps, second.total.num_drafts) == (40, 0)


def test_without_tokenizers_the_sizes_must_agree():
    for pair in [
        (model_with(), model_with(vocab_size=65)),
        (model_with(tiny_tokenizer()), model_with(vocab_size=65)),
        (model_with(), model_with(tiny_tokenizer(), vocab_size=65)),
    ]:
        with pytest.raises(ConfigError, match="64 and 65"):
            check_pair(*pair)
    check_pair(model_with(tiny_tokenizer()), model_with())


def test_vocabularies_that_differ_at_one_id_name_both_tokens():
    ours = {"a": 0, "b": 1, "c": 2, "d": 3}
    theirs = {"a": 0, "x": 1, "y": 2, "d": 3}
    with pytest.raises(ConfigError, match="id 1 is 'b' for the target and 'x' for the draft"):
        check_pair(model_with(tokenizer_of(ours)), model_with(tokenizer_of(theirs)))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "b": 1}, None),
        ({"a": 0, "b": 1}, {"b": 1, "a": 0}, None),
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, (0, "a", "b")),
        ({"a": 0, "b": 1}, {"a": 0}, (1, "b", None)),
        ({"a": 0}, {"a": 0, "b": 7}, (7, None, "b")),
        ({"a": 0, "b": 9}, {"a": 0, "b": 8}, (8, None, "b")),
        ({"a": 0, "Z": 3, "b": 9}, {"a": 0, "z": 3, "B": 9}, (3, "Z", "z")),
    ],
)
def test_the_first_id_that_two_tokenizers_read_differently(ours, theirs, expected):
    assert first_mismatch(tokenizer_of(ours), tokenizer_of(theirs)) == expected


def test_added_tokens_are_compared_as_well():
    other = tokenizers.Tokenizer.from_str(tiny_tokenizer().backend.to_str())
    other.add_special_tokens(["<pad>"])
    added = dataclasses.replace(tiny_tokenizer(), backend=other)
    size = tiny_tokenizer().vocab_size
    assert first_mismatch(tiny_tokenizer(), added) == (size, None, "<pad>")


@pytest.mark.parametrize("run", [generate, stream])
def test_a_wrong_pair_is_refused_before_anything_runs(run):
    speculation = Speculation(draft=model_with(vocab_size=65))
    with pytest.raises(ConfigError, match="64 and 65"):
        list(run(tiny(NAME).model, [[1]], SamplingParams(max_tokens=2), speculation=speculation))


@pytest.mark.parametrize("run", [generate, stream])
def test_greedy_verification_refuses_a_row_that_samples(run):
    speculation = Speculation(draft=tiny(NAME).model, verification="greedy")
    options = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, temperature=0.5)]
    with pytest.raises(RequestError, match=r"Greedy verification needs temperature 0, .*0\.5"):
        list(run(tiny(NAME).model, [[1]] * 2, options, speculation=speculation))


def test_someone_must_draft_unless_passes_are_only_made_equally_wide():
    with pytest.raises(RequestError, match="neither a draft model nor n-gram options"):
        Speculation()
    assert Speculation(exact=True).drafter.names == ()


@pytest.mark.parametrize("seconds", [((1.0, 0.0),), ((1.0, -1.0),), ((1.0, float("nan")),)])
def test_times_must_be_positive(seconds):
    with pytest.raises(RequestError, match=r"seconds of round_times must be a list .* above 0"):
        RoundTimes(seconds=seconds)


def test_times_must_be_this_speculations():
    times = RoundTimes(seconds=((1.0, 2.0, 3.0),))
    model = tiny(NAME).model
    assert Speculation(draft=model, draft_len=2, round_times=times).drafter.may_decline
    for options in ({"draft_len": 3}, {"draft_len": 2, "ngram": NgramConfig(max_draft=2)}):
        with pytest.raises(RequestError, match=r"measured for this speculation.* got \(1, 3\)"):
            Speculation(draft=model, round_times=times, **options)


@pytest.mark.parametrize(
    ("target_size", "draft_size", "verification"), [(64, 72, "coupled"), (72, 64, "rejection")]
)
def test_embeddings_padded_to_different_sizes(target_size, draft_size, verification):
    """The same text as without speculation, and never an id that is only padding.

    A prompt may hold such an id all the same: the draft, whose embedding may lack it, must cope.
    """
    target, draft = (
        dataclasses.replace(
            make_tiny(dataclasses.replace(CONFIGS[NAME], vocab_size=size, num_layers=1)).model,
            tokenizer=tiny_tokenizer(),
        )
        for size in (target_size, draft_size)
    )
    speculation = Speculation(draft=draft, draft_len=3, verification=verification)
    options = SamplingParams(
        max_tokens=30, temperature=5.0 if verification == "coupled" else 0.0, seed=3
    )
    prompts = [[*prompt_ids(8), target_size - 1]]
    (plain,) = generate(target, prompts, options)
    (completion,) = generate(target, prompts, options, speculation=speculation)
    assert completion.token_ids == plain.token_ids
    assert max(completion.token_ids) < tiny_tokenizer().vocab_size
    assert completion.speculation is not None
    assert completion.speculation.total.num_draft_tokens > 0
