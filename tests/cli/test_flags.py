import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_jax.cli.flags import (
    add_shared_flags,
    add_template_flags,
    sampling_params,
    template_variables,
)
from ssd_jax.cli.parser import Parser, UsageError, bind_variables, fill_in
from ssd_jax.errors import RequestError
from ssd_jax.sampling_params import SamplingParams

TEXTS = st.text(min_size=1).filter(lambda text: text.strip() != "" and not text.startswith("-"))
VALUES = {
    "--model": TEXTS,
    "--dtype": st.sampled_from(["float32", "bfloat16"]),
    "--temperature": st.floats(0, 10).map(str),
    "--top-k": st.integers(0, 99).map(str),
    "--top-p": st.floats(0.01, 1).map(str),
    "--presence-penalty": st.floats(0, 2).map(str),
    "--seed": st.integers(0, 2**64 - 1).map(str),
    "--max-tokens": st.integers(1, 10**6).map(str),
    "--logprobs": st.integers(0, 64).map(str),
    "--compilation-cache": TEXTS,
}


def parse(argv=(), environment=None):
    parser = Parser(prog="test", allow_abbrev=False)
    add_template_flags(parser.add_argument_group("template"))
    add_shared_flags(parser)
    flags = bind_variables(parser)
    return fill_in(parser.parse_args(argv), flags, environment or {})


def variable(flag):
    return "SSD_JAX_" + flag.removeprefix("--").replace("-", "_").upper()


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_variable_means_what_its_flag_means(chosen):
    argv = [part for flag, text in chosen.items() for part in (flag, text)]
    environment = {variable(flag): text for flag, text in chosen.items()}
    assert parse(argv) == parse(environment=environment)


@given(st.sampled_from(sorted(VALUES)), st.data())
def test_the_command_line_wins_over_a_variable(flag, data):
    given_text, other = data.draw(VALUES[flag]), data.draw(VALUES[flag])
    assert parse([flag, given_text], {variable(flag): other}) == parse([flag, given_text])


@given(
    st.lists(st.text(min_size=1), min_size=1), st.dictionaries(st.integers(0, 9), st.floats(-5, 5))
)
def test_repeatable_flags_take_a_json_list(stops, biases):
    argv = [f"--stop={text}" for text in stops]
    argv += [f"--logit-bias={token}={bias}" for token, bias in biases.items()]
    environment = {
        "SSD_JAX_STOP": json.dumps(stops),
        "SSD_JAX_LOGIT_BIAS": json.dumps([f"{token}={bias}" for token, bias in biases.items()]),
    }
    from_flags = sampling_params(parse(argv), room=9)
    assert from_flags == sampling_params(parse(environment=environment), room=9)
    assert from_flags.stop == tuple(stops)
    assert from_flags.logit_bias == biases


@pytest.mark.parametrize("text", ["[END]", "###", '{"a": 1}', "7"])
def test_a_variable_that_is_no_json_list_is_one_value(text):
    assert parse(environment={"SSD_JAX_STOP": text}).stop == [text]


def test_the_command_line_replaces_a_repeatable_variable():
    assert parse(["--stop", "a"], {"SSD_JAX_STOP": '["b", "c"]'}).stop == ["a"]


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("Yes", True), ("off", False)])
def test_switches_take_words(text, expected):
    environment = {"SSD_JAX_JSON": text, "SSD_JAX_STREAM": text}
    args = parse(environment=environment)
    assert (args.json, args.stream) == (expected, expected)
    args = parse(["--no-json", "--stream"], environment)
    assert (args.json, args.stream) == (False, True)


def test_an_empty_variable_counts_as_unset():
    assert parse(environment={"SSD_JAX_TOP_K": "", "SSD_JAX_JSON": ""}) == parse()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SSD_JAX_TOP_P", "0"),
        ("SSD_JAX_TOP_K", "many"),
        ("SSD_JAX_JSON", "maybe"),
        ("SSD_JAX_DTYPE", "float8"),
        ("SSD_JAX_STOP_TOKEN_ID", "[1, true]"),
        ("SSD_JAX_STOP", '["a", ""]'),
        ("SSD_JAX_LOGIT_BIAS", "5"),
    ],
)
def test_a_bad_value_names_its_variable(name, text):
    with pytest.raises(UsageError, match=name):
        parse(environment={name: text})


def test_no_compilation_cache_is_off():
    assert parse(["--no-compilation-cache"]).compilation_cache == "off"
    wins = parse(["--no-compilation-cache"], {"SSD_JAX_COMPILATION_CACHE": "folder"})
    assert wins.compilation_cache == "off"
    wins = parse(["--compilation-cache", "x"], {"SSD_JAX_COMPILATION_CACHE": "off"})
    assert wins.compilation_cache == "x"


def test_each_flag_names_its_variable_in_the_help():
    parser = Parser(prog="test")
    add_shared_flags(parser)
    flags = bind_variables(parser)
    words = parser.format_help().split()
    for flag in flags:
        assert f"[{flag.variable}]" in words


def test_all_options_reach_the_request():
    options = {
        "--max-tokens": "3",
        "--temperature": "0.5",
        "--top-k": "4",
        "--top-p": "0.6",
        "--min-p": "0.1",
        "--repetition-penalty": "1.1",
        "--presence-penalty": "0.2",
        "--frequency-penalty": "0.3",
        "--logit-bias": "7=-inf",
        "--seed": "8",
        "--stop": "a",
        "--stop-token-id": "9",
        "--logprobs": "2",
    }
    argv = [part for option in options.items() for part in option]
    argv += ["--ignore-eos", "--stop", "b", "--stop-token-id", "10"]
    assert sampling_params(parse(argv), room=100) == SamplingParams(
        max_tokens=3,
        temperature=0.5,
        top_k=4,
        top_p=0.6,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={7: float("-inf")},
        seed=8,
        stop=("a", "b"),
        stop_token_ids=(9, 10),
        ignore_eos=True,
        logprobs=2,
    )


def test_without_flags_the_request_is_greedy_bounded_and_repeatable():
    params = sampling_params(parse(), room=1000)
    assert params == SamplingParams(max_tokens=256, seed=0)
    assert sampling_params(parse(), room=10).max_tokens == 10


def test_flags_are_not_abbreviated():
    with pytest.raises(UsageError, match="--temper"):
        parse(["--temper", "1"])


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (["-m", "folder"], ["--model", "folder"]),
        (["-md", "folder"], ["--draft-model", "folder"]),
        (["-n", "7"], ["--max-tokens", "7"]),
        (["-n7"], ["--max-tokens=7"]),
        (["-s", "7"], ["--seed", "7"]),
        (["-sys", "text"], ["--system", "text"]),
        (["--system-prompt", "text"], ["--system", "text"]),
        (["--temp", "0.5"], ["--temperature", "0.5"]),
    ],
)
def test_short_names(short, long):
    assert parse(short) == parse(long)


def test_a_flag_wins_over_a_recommendation_and_a_recommendation_over_the_default():
    recommended = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    args = parse(["--top-k", "0"], {"SSD_JAX_REPETITION_PENALTY": "1"})
    params = sampling_params(args, room=9, recommended=recommended)
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.6, 0, 1)
    assert params.top_p == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=1", 1),
        ("k=true", True),
        ('k={"a": [null]}', {"a": [None]}),
        ("k=some text", "some text"),
        ("k=", ""),
        ("k=a=b", "a=b"),
        ("k=NaN", "NaN"),
        ("k=" + "9" * 5000, "9" * 5000),
    ],
)
def test_template_arguments_are_json_or_text(text, value):
    args = parse(["--template-arg", text])
    assert template_variables(args, "{{ k }}") == {"k": value}


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--template-arg", "other=1"], "has no variable other"),
        (["--no-enable-thinking"], "has no variable enable_thinking"),
        (["--template-arg", "k=1", "--template-arg", "k=2"], "k is set twice"),
    ],
)
def test_template_arguments_that_would_do_nothing_are_refused(argv, fragment):
    with pytest.raises(RequestError, match=fragment):
        template_variables(parse(argv), "{{ k }} {{ another }}")


def test_thinking_is_a_template_argument():
    assert template_variables(parse(["--no-enable-thinking"]), "{{ enable_thinking }}") == {
        "enable_thinking": False
    }
    assert template_variables(parse(), "{{ enable_thinking }}") == {}


def test_converters_refuse_in_words():
    for argv in (["--seed", "x"], ["--top-p", "x"], ["--logit-bias", "x=1"]):
        with pytest.raises(UsageError, match=r"expected a .*number, got 'x'"):
            parse(argv)
