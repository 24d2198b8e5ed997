import dataclasses

import pytest
import tokenizers

import ssd_jax
from ssd_jax.cli import long_answer
from ssd_jax.cli.long_answer import stream_answer
from ssd_jax.errors import MemoryBudgetError
from ssd_jax.generation import stream

PROMPT = [40, 50, 60]
SAMPLED = ssd_jax.SamplingParams(
    temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=5, ignore_eos=True
)


@pytest.fixture(scope="module")
def model(chat_checkpoint):
    """A model with a context of 64 tokens."""
    return ssd_jax.load_model(chat_checkpoint)


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    """Stages of 6, 12, ... tokens; their sizes are noted."""
    sizes = []

    def noted(model, prompts, params, **options):
        sizes.append(params.max_tokens)
        return stream(model, prompts, params, **options)

    monkeypatch.setattr(long_answer, "FIRST_STAGE", 6)
    monkeypatch.setattr(long_answer, "stream", noted)
    return sizes


def whole(model, params):
    return ssd_jax.generate(model, [PROMPT], params)[0]


def staged(model, params, speculation=None):
    """The completion, after the pieces were found to make it up."""
    deltas = list(stream_answer(model, PROMPT, params, speculation))
    completion = deltas[-1].completion
    assert completion is not None
    assert "".join(delta.text for delta in deltas) == completion.text
    assert sum((delta.token_ids for delta in deltas), ()) == completion.token_ids
    return completion


@pytest.mark.parametrize("params", [SAMPLED, dataclasses.replace(SAMPLED, temperature=0.0)])
def test_stages_give_the_output_of_one_run(model, stages, params):
    assert staged(model, params) == whole(model, params)
    assert stages == [6, 12, 24, 19]


def test_a_stop_string_may_lie_in_two_stages(model, stages):
    text = whole(model, SAMPLED).text
    ends = (stop := text[4:9], stop[:3])
    for stop in ends:
        params = dataclasses.replace(SAMPLED, stop=(stop,))
        assert staged(model, params) == whole(model, params)


def test_an_end_of_text_ends_the_stages(model, stages):
    ids = whole(model, SAMPLED).token_ids
    params = dataclasses.replace(SAMPLED, stop_token_ids=(ids[9],))
    completion = staged(model, params)
    assert completion == whole(model, params)
    assert completion.finish_reason == "eos"
    assert len(stages) <= 2


def test_speculation_is_counted_over_all_stages(model, stages):
    ngram = ssd_jax.NgramConfig(kind="simple")
    speculation = ssd_jax.Speculation(ngram=ngram, draft_len=4)
    params = dataclasses.replace(SAMPLED, temperature=0.0)
    completion = staged(model, params, speculation)
    assert completion.token_ids == whole(model, params).token_ids
    counts = completion.speculation
    emitted = counts.target_steps + counts.total.num_accepted_tokens
    assert len(completion.token_ids) - len(stages) <= emitted <= len(completion.token_ids)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 30}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}]
)
def test_one_stage_where_stages_would_differ_or_are_not_needed(model, stages, options):
    params = dataclasses.replace(SAMPLED, **options)
    assert staged(model, params) == whole(model, params)
    assert len(stages) == 1


def test_memory_that_ends_later_ends_the_output(model, stages, monkeypatch):
    inner = long_answer.stream

    def short_of_memory(model, prompts, params, **options):
        if stages:
            raise MemoryBudgetError("full")
        yield from inner(model, prompts, params, **options)

    monkeypatch.setattr(long_answer, "stream", short_of_memory)
    completion = staged(model, SAMPLED)
    assert completion.token_ids == whole(model, SAMPLED).token_ids[:6]
    assert completion.finish_reason == "length"
    with pytest.raises(MemoryBudgetError):
        staged(model, SAMPLED)


@pytest.mark.parametrize("params", [SAMPLED, dataclasses.replace(SAMPLED, max_tokens=9)])
def test_a_reply_does_not_begin_with_the_space_of_a_continuation(model, params):
    words = {f"\u2581w{index}": index for index in range(model.config.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    tokenizer = dataclasses.replace(model.tokenizer, backend=backend)
    spaced = dataclasses.replace(model, tokenizer=tokenizer)
    reply, text = (
        "".join(
            delta.text for delta in stream_answer(spaced, PROMPT, params, None, as_reply=as_reply)
        )
        for as_reply in (True, False)
    )
    assert reply.startswith("w")
    assert text == f" {reply}"
