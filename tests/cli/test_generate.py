import json
import re

import pytest

import ssd_jax
from ssd_jax.cli import answer

STATISTICS = re.compile(
    r"12 tokens, [\d,]+ tokens/s, first token after [\d.]+ s \(\+ [\d.]+ s compiling\), "
    r"stopped by length\n"
)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    """What the Python interface gives for the same request."""
    model = ssd_jax.load_model(tiny_checkpoint)
    params = ssd_jax.SamplingParams(max_tokens=12, seed=0)
    return ssd_jax.generate(model, ["the cat"], params)[0]


def test_text_goes_to_stdout_and_statistics_to_stderr(generate, expected):
    outcome = generate("the cat")
    assert (outcome.code, outcome.out) == (0, expected.text + "\n")
    assert STATISTICS.fullmatch(outcome.err)


def test_quiet_leaves_stderr_empty(generate):
    assert generate("the cat", "--quiet").err == ""


def test_streaming_does_not_change_the_text(generate, expected):
    assert generate("the cat", "--no-stream").out == expected.text + "\n"


def test_echo_prints_the_prompt_first(generate, expected):
    assert generate("the cat", "--echo").out == f"the cat{expected.text}\n"


def test_json_is_one_object_with_everything(generate, expected):
    outcome = generate("the cat", "--json", "--logprobs", "2", "--echo")
    account = json.loads(outcome.out)
    assert account["text"] == expected.text
    assert account["token_ids"] == list(expected.token_ids)
    assert account["finish_reason"] == "length"
    assert account["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": 12,
    }
    assert account["seed"] == 0
    assert account["timings"].keys() == {
        "first_token_s",
        "decode_s",
        "compile_s",
        "tokens_per_s",
    }
    assert [entry["token_id"] for entry in account["logprobs"]] == account["token_ids"]
    for entry in account["logprobs"]:  # greedy: the chosen token is the most likely one
        assert entry["top"][0] == [entry["token_id"], entry["logprob"]]
        assert len(entry["top"]) == 2


def test_json_has_no_infinity_where_alternatives_are_impossible(generate):
    """A law cut to one token gives the others no probability at all."""
    options = ("--temperature", "1", "--top-k", "1", "--logprobs", "3")
    outcome = generate("the cat", "--json", *options)
    assert "Infinity" not in outcome.out
    for entry in json.loads(outcome.out)["logprobs"]:
        assert [value for _, value in entry["top"]] == [0.0, None, None]


def test_log_probabilities_that_nobody_would_see_are_refused(generate):
    outcome = generate("the cat", "--logprobs", "2")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--logprobs are printed with --json only: add --json, or leave it out." in outcome.err


def test_the_seed_decides_a_sampled_text(generate):
    outputs = [generate("the cat", "--temperature", "1", "--seed", seed).out for seed in (1, 2, 1)]
    assert outputs[0] == outputs[2] != outputs[1]


def test_a_stop_string_ends_the_text(generate, expected):
    stop = expected.text[5:8]
    outcome = generate("the cat", "--stop", stop)
    assert outcome.out == expected.text[: expected.text.index(stop)] + "\n"
    assert outcome.err.endswith("stopped by stop string\n")


def test_a_stop_token_ends_the_text(generate, expected):
    outcome = generate("the cat", "--json", "--stop-token-id", expected.token_ids[0])
    assert json.loads(outcome.out)["finish_reason"] == "eos"
    assert "1 token," in outcome.err


def test_prompt_from_stdin_is_taken_as_it_is(generate):
    prompt = "the cat\n sat "
    assert generate("-", "--echo", stdin=prompt.encode()).out == generate(prompt, "--echo").out


def test_output_is_bounded_by_the_context(run, chat_checkpoint):
    outcome = run("generate", "the cat", "--model", chat_checkpoint, "--json", "--ignore-eos")
    assert sum(json.loads(outcome.out)["usage"].values()) == 64


def test_the_prompt_may_be_a_flag_or_a_variable(generate, expected):
    assert generate("-p", "the cat").out == expected.text + "\n"
    assert generate(SSD_JAX_PROMPT="the cat").out == expected.text + "\n"
    assert generate("the cat", SSD_JAX_PROMPT="a dog").out == expected.text + "\n"
    assert generate("-p", "-", stdin=b"the cat").out == expected.text + "\n"


@pytest.fixture
def make_chat_model(chat_checkpoint, tmp_path):
    """Makes the chat checkpoint with a generation_config.json, and with another template if any."""

    def make(generation_config, template=None):
        for file in chat_checkpoint.iterdir():
            (tmp_path / file.name).symlink_to(file)
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
        if template is not None:
            (tmp_path / "chat_template.jinja").unlink()
            (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


def test_a_chat_is_the_template_around_the_prompt(run, chat_checkpoint):
    shared = ("--model", chat_checkpoint, "-n", 8, "--quiet", "--ignore-eos")
    plain = "<system>dog</><user>the cat</><assistant>"
    outcome = run("generate", "--chat", "the cat", "-sys", "dog", *shared)
    assert outcome.out == run("generate", plain, *shared).out


def test_an_answer_in_a_chat_is_as_long_as_the_context_allows(run, chat_checkpoint):
    outcome = run("generate", "--chat", "x", "-m", chat_checkpoint, "--json", "--ignore-eos")
    assert sum(json.loads(outcome.out)["usage"].values()) == 64


def test_a_template_gets_its_variables(run, make_chat_model):
    template = "{{ messages[0].content }}{% if thinking is defined %}{{ thinking * 2 }}{% endif %}"
    model = make_chat_model({}, template)
    shared = ("--model", model, "-n", 8, "--json", "--ignore-eos")

    def text(*argv):
        return json.loads(run("generate", *argv, *shared).out)["text"]

    assert text("--chat", "the", "--template-arg", "thinking=5") == text("the10")
    assert text("--chat", "the", "--template-arg", "thinking=cat") == text("thecatcat")
    assert text("--chat", "the") == text("the")


def test_the_models_own_sampling_is_used_in_a_chat_told_and_overridden(run, make_chat_model):
    model = make_chat_model({"do_sample": True, "temperature": 1.5, "top_k": 50, "num_beams": 4})
    shared = ("--model", model, "-n", 12, "--ignore-eos", "--seed", 3)
    first = ("--chat", "the cat")
    plain = "<user>the cat</><assistant>"

    def same(left, right):
        return run("generate", *left, *shared).out == run("generate", *right, *shared).out

    told = run("generate", *first, *shared).err.splitlines()[0]
    assert told == (
        "sampling from generation_config.json: temperature 1.5, top_k 50; not used: num_beams "
        "(--no-generation-config switches it off)"
    )
    assert same(first, (plain, "--temperature", "1.5", "--top-k", "50"))
    assert same((*first, "--top-k", "2"), (plain, "--temperature", "1.5", "--top-k", "2"))
    assert same((*first, "--no-generation-config"), (plain,))
    assert same((plain, "--generation-config"), first)
    assert not same(first, (plain,))
    overridden = run("generate", *first, *shared, "--temp", "1.5", "--top-k", "50")
    assert "temperature" not in overridden.err
    assert run("generate", *first, *shared, "--quiet").err == ""


def test_a_converted_model_keeps_its_own_sampling(run, make_chat_model, tmp_path_factory):
    converted = tmp_path_factory.mktemp("converted")
    assert run("convert", make_chat_model({"temperature": 0.5}), converted).code == 0
    outcome = run("generate", "--chat", "the cat", "-m", converted, "-n", 2)
    assert outcome.err.startswith("sampling from generation_config.json: temperature 0.5 (")


def test_malformed_recommendations_are_refused_where_they_are_used(run, make_chat_model):
    model = make_chat_model({"temperature": "hot"})
    outcome = run("generate", "--chat", "the", "-m", model, "-n", 2)
    assert (outcome.code, outcome.out) == (2, "")
    assert "temperature in the model's generation_config.json" in outcome.err
    for argv in (("--chat", "--no-generation-config"), ()):
        assert run("generate", "the", *argv, "-m", model, "-n", 2).code == 0


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C arrives after the first piece of the text."""
    whole = answer.stream_answer

    def stream(*arguments, **options):
        for index, delta in enumerate(whole(*arguments, **options)):
            if index == 1:
                raise KeyboardInterrupt
            yield delta

    monkeypatch.setattr(answer, "stream_answer", stream)


def test_interrupted_text_stays(generate, expected, interrupted):
    outcome = generate("the cat")
    assert outcome.code == 130
    text = outcome.out.removesuffix("\n")
    assert 0 < len(text) < len(expected.text)
    assert expected.text.startswith(text)
    assert outcome.err.endswith("interrupted\n")


def test_interrupted_json_says_so(generate, expected, interrupted):
    outcome = generate("the cat", "--json")
    account = json.loads(outcome.out)
    assert outcome.code == 130
    assert account["finish_reason"] == "interrupted"
    assert account["token_ids"] == list(expected.token_ids)[: len(account["token_ids"])]


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        ((), "PROMPT"),
        (("x", "y"), "y"),
        (("x", "-p", "y"), "not allowed with argument PROMPT"),
        (("x", "--chat"), "a model with a chat template"),
        (("x", "--chat", "--echo"), "leave out --chat"),
        (("x", "--system", "y"), "add --chat"),
        (("x", "--enable-thinking"), "add --chat"),
        (("x", "--template-arg", "k=v"), "add --chat"),
        (("x", "--template-arg", "=v"), "expected K=V"),
        (("x", "--colour"), "--colour"),
        (("x", "--model", "no\n\x1b[2Jsuch"), "no\\n\\x1b[2Jsuch"),
        (("",), "The prompt is empty"),
        (("a" * 20000,), "16384"),
        (("the", "--max-tokens", "0"), "at least 1 or None, got 0"),
        (("the", "--max-tokens", "16384"), "context of 16384"),
        (("the", "--temperature", "-1"), "at least 0"),
        (("the", "--temperature", "nan"), "finite"),
        (("the", "--top-p", "0"), "(0, 1], got 0.0"),
        (("the", "--top-p", "1.5"), "(0, 1], got 1.5"),
        (("the", "--top-k", "few"), "whole number"),
        (("the", "--seed", "-1"), "seed"),
        (("the", "--stop", ""), "that is not empty"),
        (("the", "--logit-bias", "7"), "ID=VALUE"),
        (("the", "--logit-bias", "128=1"), "0 to 127"),
        (("the", "--stop-token-id", "128"), "0 to 127"),
        (("the", "--dtype", "float8"), "float8"),
        (("the", "--model", "no/such/folder"), "no/such/folder"),
        (("\udc80",), "Unicode"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(generate, argv, fragment):
    outcome = generate(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("ssd-jax: error: ")
    assert outcome.err.count("\n") == 1
    assert fragment in outcome.err


def test_a_bad_variable_is_named(generate):
    outcome = generate("the", SSD_JAX_TOP_P="2")
    assert (outcome.code, outcome.out) == (2, "")
    assert "SSD_JAX_TOP_P" in outcome.err


def test_stdin_must_be_utf8(generate):
    outcome = generate("-", stdin=b"caf\xe9")
    assert (outcome.code, outcome.out) == (2, "")
    assert "byte 3" in outcome.err


def test_damaged_weights_are_an_error(run, tiny_checkpoint, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(tiny_checkpoint / name)
    whole = (tiny_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    outcome = run("generate", "the", "--model", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert "model.safetensors" in outcome.err


def test_an_answer_is_a_text_by_itself(run, chat_checkpoint, monkeypatch):
    seen = []
    whole = answer.stream_answer

    def stream(*arguments, as_reply, **options):
        seen.append(as_reply)
        return whole(*arguments, as_reply=as_reply, **options)

    monkeypatch.setattr(answer, "stream_answer", stream)
    for argv in (("generate", "the"), ("generate", "--chat", "the"), ("chat",)):
        assert run(*argv, "-m", chat_checkpoint, "-n", 2, stdin=b"the\n/continue\n").code == 0
    assert seen == [False, True, True, False]
