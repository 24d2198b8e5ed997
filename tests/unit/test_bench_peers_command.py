"""`ssd-jax bench peers` as a whole, with peers that are stubs."""

import argparse
import json

import pytest
from peer_stubs import PROGRAM, stub_peer

import bench.record
from bench.peers import __main__ as command
from bench.peers import starting
from bench.peers.client import PeerError
from bench.peers.resuming import SCHEMA
from ssd_jax.errors import ConfigError

NAMES = ("ours/ar", "transformers/plain", "transformers/refuse", "llama.cpp/plain")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ("def a(", "x" * 9000, "def b(")
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    return path


@pytest.fixture(autouse=True)
def own_cores(monkeypatch):
    """The test's process keeps its cores and environment."""
    monkeypatch.setattr(command, "use_cores", lambda threads: list(range(threads)))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """All but llama.cpp are stubs, which is absent; what was asked, and when to do what."""
    real, calls, then = command.start, [], {}

    def start(name, args, load, work):
        if name == "llama.cpp":
            return real(name, args, load, work)
        peer = stub_peer(tmp_path, program=then.get("program", PROGRAM))
        answer = peer.run

        def run(request):
            calls.append((name, request.mode))
            then.get(len(calls), lambda: None)()
            return answer(request)

        monkeypatch.setattr(peer, "run", run)
        return peer, load

    monkeypatch.setattr(command, "start", start)
    return argparse.Namespace(calls=calls, then=then)


@pytest.fixture
def compare(tmp_path, prompts):
    """Two prompts, three peers; each prompt asks ours twice and transformers twice."""
    fixed = (
        *("--prompts", str(prompts), "--contenders", *NAMES, "--environments", str(tmp_path)),
        *("--max-tokens", "4", "--rounds", "1", "--out", str(tmp_path / "record.json")),
    )
    return lambda *more: command.main([*fixed, *more])


def record_of(tmp_path):
    return json.loads((tmp_path / "record.json").read_text())


def interrupt():
    raise KeyboardInterrupt


def test_the_command_compares_who_is_there_and_names_who_is_not(tmp_path, compare, asked, capsys):
    assert compare() == 0
    record = record_of(tmp_path)
    assert (record["kind"], record["schema"], record["complete"]) == ("peers", SCHEMA, True)
    assert (record["plan"]["num_prompts"], len(record["units"])) == (2, 2)
    assert list(record["contenders"]) == ["ours/ar", "transformers/plain"]
    assert "No such mode" in record["failed"]["transformers/refuse"]
    assert "llama-server" in record["skipped"]["llama.cpp"]
    turns = record["units"][1]["turns"]["transformers/plain"]
    assert len(turns["output"]["tokens"]) == 4
    assert [answer["tokens"] for answer in turns["timed"]] == [None]
    assert "llama.cpp is skipped" in capsys.readouterr().err


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, compare, asked, capsys):
    assert compare() == 0
    whole = record_of(tmp_path)
    (tmp_path / "record.json").unlink()
    asked.calls.clear()
    asked.then[7] = interrupt  # in the second prompt: ours, transformers twice, then as often less
    with pytest.raises(KeyboardInterrupt):
        compare()
    assert "the same command goes on" in capsys.readouterr().err
    begun = record_of(tmp_path)
    assert (begun["complete"], len(begun["units"])) == (False, 1)
    assert begun["contenders"]["ours/ar"]["decode_tokens_per_s"] == 1.5
    asked.calls.clear()
    asked.then.clear()
    assert compare() == 0
    assert asked.calls == [("ours", "ar"), ("transformers", "plain")] * 2
    resumed = record_of(tmp_path)
    assert len(resumed["sittings"]) == 2
    same = ("complete", "plan", "units", "contenders", "failed", "skipped", "best", "versions")
    assert [resumed[name] for name in same] == [whole[name] for name in same]
    assert compare() == 0
    assert "holds the whole run already" in capsys.readouterr().err
    assert len(asked.calls) == 4


@pytest.fixture
def begun(tmp_path, compare, asked):
    """A record of one prompt."""
    asked.then[7] = interrupt
    with pytest.raises(KeyboardInterrupt):
        compare()
    asked.then.clear()
    asked.calls.clear()
    return tmp_path / "record.json"


def change(path, *keys, value):
    record = json.loads(path.read_text())
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(record))


def test_another_plan_commit_version_or_kind_is_refused(begun, compare, asked, prompts, capsys):
    def refusal(*more):
        assert compare(*more) == 2
        return capsys.readouterr().err

    capsys.readouterr()
    assert "max_tokens 4, which cannot go on with 5" in refusal("--max-tokens", "5")
    assert "dtype 'float32', which cannot go on with 'bfloat16'" in refusal("--dtype", "bfloat16")
    content = prompts.read_text()
    prompts.write_text(content.replace("def b", "def c"))
    assert "with prompts_sha256" in refusal()
    prompts.write_text(content)
    asked.then["program"] = PROGRAM.replace('"stub"', '"other"')
    assert "with ours of versions" in refusal()
    del asked.then["program"]
    commit = json.loads(begun.read_text())["environment"]["commit"]
    change(begun, "environment", "commit", value="another")
    assert "with commit 'another'" in refusal()
    change(begun, "environment", "commit", value=commit)
    change(begun, "schema", value=1)
    assert f"should have schema {SCHEMA}, got 1" in refusal()
    change(begun, "kind", value="run")
    assert "should be a record of `ssd-jax bench peers`" in refusal()
    assert asked.calls == []


def test_a_peer_that_is_gone_is_not_left_out_of_a_comparison(begun, compare, monkeypatch, capsys):
    start = command.start

    def gone(name, args, load, work):
        if name == "transformers":
            raise PeerError("No such program.")
        return start(name, args, load, work)

    before = begun.read_bytes()
    monkeypatch.setattr(command, "start", gone)
    assert compare() == 2
    error = capsys.readouterr().err
    assert "holds answers of transformers, which cannot go on: No such program." in error
    assert json.loads(begun.read_text())["units"] == json.loads(before)["units"]


def test_a_full_disk_is_told_and_leaves_what_was_measured(
    tmp_path, compare, asked, monkeypatch, capsys
):
    real = bench.record.write_record

    def full(record, path):
        if len(record["units"]) == 2:
            raise ConfigError(f"{path} cannot be written (No space left on device).")
        real(record, path)

    monkeypatch.setattr(bench.record, "write_record", full)
    assert compare() == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "goes on from there" in error
    assert len(record_of(tmp_path)["units"]) == 1
    monkeypatch.setattr(bench.record, "write_record", real)
    assert compare() == 0
    assert record_of(tmp_path)["complete"]


def test_a_file_that_cannot_be_written_is_noticed_before_anything_is_asked(
    tmp_path, compare, asked, capsys
):
    assert compare("--out", str(tmp_path / "absent" / "record.json")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert asked.calls == []


def test_environments_that_cannot_be_made_are_skipped_with_the_reason(
    tmp_path, compare, asked, monkeypatch
):
    def make(name, folder):
        raise PeerError(f"{name} needs a network.")

    monkeypatch.setattr(starting, "make", make)
    assert compare("--make") == 0
    skipped = record_of(tmp_path)["skipped"]
    assert skipped == {name: f"{name} needs a network." for name in ("transformers", "llama.cpp")}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--contenders", "chess/plain"], "chess/plain"),
        (["--max-tokens", "2000"], "lower --max-tokens"),
        (["--model", "absent"], "absent"),
    ],
)
def test_the_command_refuses_in_one_sentence(prompts, capsys, arguments, complaint):
    assert command.main(["--prompts", str(prompts), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.peers: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_more_threads_than_cores_are_refused(prompts, monkeypatch, capsys):
    monkeypatch.undo()
    assert command.main(["--prompts", str(prompts), "--threads", "100000"]) == 2
    assert "--threads must be 1 to" in capsys.readouterr().err
