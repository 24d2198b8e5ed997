"""Malformed command lines: each ends well or in one sentence, never in a traceback.

Command lines that are right are changed at random and run in this process. Models are loaded once,
and what would be measured or decoded is not: the checks before it are what is tried.
"""

import contextlib
import dataclasses
import functools
import io
import random
from pathlib import Path

import pytest
from fuzz_cases import SLOW_COUNT, numbered
from huggingface_hub import constants

from ssd_jax.cli import answer, bench, convert, doctor, session, speculation, timeline
from ssd_jax.cli.main import main
from ssd_jax.engine.batch import make_requests
from ssd_jax.engine.speculation import RoundTimes
from ssd_jax.errors import RequestError
from ssd_jax.generation import Completion, Delta, choose_method
from ssd_jax.model import demo_folder, load_model
from ssd_jax.text import chat_template, tokenizer
from ssd_jax.tuning import tune

LONGEST_SENTENCE = 600
MODEL, DRAFT = str(demo_folder("target")), str(demo_folder("draft"))
SEEDS = (
    ["generate", "the cat", "-n", "8"],
    ["generate", "-p", "the cat", "--temp", "0.8", "--top-p", "0.9", "--top-k", "5", "-s", "3"],
    [
        "generate",
        "the cat",
        "--stop",
        "a",
        "--stop-token-id",
        "7",
        "--logit-bias",
        "7=-1",
        "--json",
    ],
    ["generate", "--chat", "hi", "-sys", "be kind", "--template-arg", "messages=1", "--echo"],
    ["generate", "-", "--json", "--logprobs", "3", "--max-tokens", "5", "--ignore-eos"],
    ["generate", "x", "--method", "ssd", "-k", "2", "-f", "3,2,1", "--fallback", "ngram"],
    ["generate", "x", "--method", "ngram", "--ngram-kind", "mod", "--ngram-n", "4", "--exact"],
    ["generate", "x", "--method", "draft", "-k", "auto", "-m", MODEL, "-md", DRAFT],
    ["generate", "x", "--method", "combined", "--verification", "rejection", "--dtype", "float32"],
    ["generate", "x", "--tuned", "no.toml", "--timeline", "rounds.png", "--miss-weight", "0.5"],
    ["chat", "-n", "5", "--quiet", "--no-generation-config", "--repetition-penalty", "1.1"],
    ["chat", "--model", MODEL, "--no-stream", "--min-p", "0.1", "--presence-penalty", "0.5"],
    [
        "tune",
        "--out",
        "tuned.toml",
        "--batch-size",
        "2",
        "--prompts",
        "no.jsonl",
        "--max-tokens",
        "4",
    ],
    ["bench", "run", "--out", "x.json"],
    ["convert", MODEL, "converted", "--dtype", "bfloat16", "--overwrite"],
    ["inspect", MODEL],
    ["doctor", "--json", "--compilation-cache", "off"],
    ["--version"],
)
VALUES = (
    *("", " ", "-", "--", "---", "-x", "--help", "-h", "=", "--=", "-n", "--json=yes", "\n", "\t"),
    *("0", "-0", "-1", "1", "1.5", "1e3", "1e39", "1e999", "nan", "-inf", "inf", "0x10", "1_0"),
    *("9" * 400, "9" * 5000, "2147483648", "18446744073709551616", "٣", "½", "1,2", "1,,2", ","),
    *("x" * 5000, "x/" * 3000, "..", ".", "/", "/dev/null", "/dev/full", "no/such", "~nobody/x"),
    *("[1,2]", "{", "null", "true", "[" * 2000, "k=v", "k=[", "=v", "7=1", "7=x", "7=nan", "-7=1"),
    *(
        "auto",
        "ssd",
        "draft",
        "float8",
        "generate",
        "chat",
        "\udcff",
        "世界",
        "\x1b[2J",
        MODEL,
        DRAFT,
    ),
    *(
        "enable_thinking=1",
        "add_generation_prompt=false",
        "ns=1",
        "off",
        "%s",
        "{0}",
        "$HOME",
        "a b",
    ),
)
LINES = (
    *("hi", "/help", "/clear", "/retry", "/undo", "/continue", "/save talk.json", "/save", "/bla"),
    *("/system x", "/system", "/exit", "//x", "/save /dev/null", "/save no/such/x", '"""', "a\\"),
    *("/save " + "x" * 5000, "/" + "x" * 5000, "", "\udcff", "\0", "/save a\0b", "x" * 5000),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Nothing is measured, decoded, converted, rendered or fetched; files stay in its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # "no/such" is a name on the hub
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    load = functools.cache(load_model)

    def render(template, messages, *, extra=None, **options):
        chat_template._check_messages(messages)
        if "messages" in (extra or {}):
            raise RequestError("taken")
        return "".join(f"<{message['content']}>" for message in messages)

    def decode(model, prompt_ids, params, speculation, *, as_reply):
        bounded = params if params.max_tokens else dataclasses.replace(params, max_tokens=1)
        requests = make_requests(model, [prompt_ids], bounded)
        choose_method(model, requests, speculation)
        completion = Completion(
            text="text",
            token_ids=(65, 66),
            finish_reason="length",
            prompt_tokens=len(prompt_ids),
            seed=0,
            logprobs=None,
            speculation=None,
        )
        yield Delta(row=0, text="text", token_ids=(65, 66), completion=completion)

    def measured(model, speculation, params):
        row = (1e-3,) * (speculation.longest_draft + 1)
        return RoundTimes(seconds=(row,) * len(speculation.names))

    def not_here(*arguments, **options):
        raise RequestError("This is not done in this test.")

    for module in (session, speculation):
        monkeypatch.setattr(
            module, "load_model", lambda folder=None, dtype=None: load(folder, dtype)
        )
    monkeypatch.setattr(session, "use_compilation_cache", lambda choice: None)
    monkeypatch.setattr(session, "can_split_cpu", lambda: False)
    monkeypatch.setattr(tokenizer, "render_chat", render)
    monkeypatch.setattr(answer, "stream_answer", decode)
    monkeypatch.setattr(speculation, "measure_round_times", measured)
    monkeypatch.setattr(
        speculation, "measure_pass_times", lambda *arguments: dict.fromkeys(range(66), 0.001)
    )
    monkeypatch.setattr(timeline, "write_timeline", not_here)
    monkeypatch.setattr(tune, "tune", not_here)
    monkeypatch.setattr(convert, "convert", not_here)
    monkeypatch.setattr(bench, "_is_there", lambda module: False)
    monkeypatch.setattr(doctor, "examine", functools.cache(doctor.examine))


def changed(rng, argv):
    """A command line with a few random changes."""
    argv = list(argv)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(argv) + 1)
        kind = rng.choice(
            ("replace", "replace", "insert", "drop", "double", "glue", "cut", "borrow")
        )
        if kind == "insert" or place == len(argv):
            argv.insert(place, rng.choice(VALUES))
        elif kind == "replace":
            argv[place] = rng.choice(VALUES)
        elif kind == "drop":
            del argv[place]
        elif kind == "double":
            argv.insert(place, argv[place])
        elif kind == "glue":
            argv[place] = f"{argv[place]}={rng.choice(VALUES)}"
        elif kind == "cut":
            argv[place] = argv[place][: rng.randrange(len(argv[place]) + 1)]
        else:
            other = rng.choice(SEEDS)
            start = rng.randrange(len(other))
            argv[place:place] = other[start : start + 2]
    return argv


def variables(rng):
    """At most one environment variable of an option, with a random value."""
    if rng.random() < 0.7:
        return {}
    names = ("TEMPERATURE", "STOP", "MAX_TOKENS", "JSON", "DRAFT_LEN", "FAN_OUT", "LOGIT_BIAS")
    names += (
        "MODEL",
        "METHOD",
        "TEMPLATE_ARG",
        "ENABLE_THINKING",
        "PROMPT",
        "SEED",
        "TUNED",
        "OUT",
    )
    return {f"SSD_JAX_{rng.choice(names)}": rng.choice(VALUES)}


def complaint(argv, environment, stdin):
    """What is wrong with how a command line ends, None if nothing is."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(argv)
        except BaseException as error:  # whatever it is, it would have been a traceback
            return f"{type(error).__name__}: {str(error)[:300]}"
    last = err.getvalue().strip("\n").rpartition("\n")[2]
    if code == 0:
        return None
    if code == 1:
        return None if argv[0] == "doctor" else "exit code 1"
    if code != 2:
        return f"exit code {code}"
    if not last.startswith("ssd-jax: error: "):
        return f"no sentence: {last[:200]!r}"
    if len(last) > LONGEST_SENTENCE:
        return f"a sentence of {len(last)} characters: {last[:100]!r}"
    return None


def complaints(numbers):
    """What is wrong, and with which command line, for random ones."""
    found = []
    for number in numbers:
        rng = random.Random(number)
        argv = changed(rng, rng.choice(SEEDS))
        lines = "\n".join(rng.choices(LINES, k=rng.randint(0, 4)))
        stdin = lines.encode("utf-8", "surrogateescape")
        environment = variables(rng)
        if (wrong := complaint(argv, environment, stdin)) is not None:
            shown = [text[:60] for text in argv]
            found.append(
                f"input {number}: {wrong} <- {shown} {str(environment)[:200]} {stdin[:200]}"
            )
    return found


def test_the_command_lines_before_the_changes_end_well(tmp_path):
    for argv in SEEDS:
        assert complaint(argv, {}, b"hi\n/help\n") is None


@pytest.mark.parametrize(
    "argv",
    [
        ["tune", "--out", "x/" * 3000],
        ["tune", "--out", "x" * 5000],
        ["inspect", "9" * 5000],
        ["chat"],
        ["inspect", MODEL, "\n"],
        ["generate", "x", "-m", "\n"],
        ["generate", "x", "--seed", "x" * 5000],
        ["tune", "--out", "tuned.toml", "--prompts", "/dev/zero"],
        ["generate", "x", "--method", "ssd", "--tuned", "/dev/zero"],
        ["doctor", "--compilation-cache", "links"],
    ],
)
def test_command_lines_that_once_ended_badly(argv):
    Path("links").mkdir()
    Path("links/nowhere").symlink_to("no such file")
    assert complaint(argv, {}, b"/save /dev/zero\n") is None


def test_changed_command_lines():
    assert complaints(numbered(400)) == []


@pytest.mark.slow
def test_ten_thousand_changed_command_lines():
    assert complaints(numbered(SLOW_COUNT)) == []
