import json

import pytest
from peer_stubs import stub_peer

from bench.peers.client import Peer, PeerError
from bench.peers.compare import Results, common_length, measure, summarise
from bench.peers.contenders import BASELINE, MODES, choose_contenders, parse_contender
from bench.peers.protocol import Answer, Load, PeerFailure, Run, number, only_options
from ssd_jax.errors import RequestError

LOAD = Load(target="t", draft=None, dtype="float32", threads=1, context=64)


def request(mode="plain", prompt=(1, 2), max_tokens=3):
    return Run(mode=mode, options={}, prompt=list(prompt), max_tokens=max_tokens)


def test_a_peer_answers_through_its_process(tmp_path):
    with stub_peer(tmp_path) as peer:
        assert peer.load(LOAD).versions == {"stub": "t"}
        answer = peer.run(request())
    assert (answer.tokens, answer.decode_s, answer.decode_tokens) == ([3, 4, 5], 2.0, 2)
    assert "chats" in (tmp_path / "log").read_text()


def test_a_peer_that_refuses_or_raises_goes_on_answering(tmp_path):
    with stub_peer(tmp_path) as peer:
        for mode, reason in (("refuse", "No such mode"), ("raise", "KeyError: 'weights'")):
            with pytest.raises(PeerError, match=f"stub failed: {reason}"):
                peer.run(request(mode))
        assert peer.run(request()).tokens == [3, 4, 5]


def test_a_peer_that_ends_is_quoted(tmp_path):
    with stub_peer(tmp_path) as peer:
        with pytest.raises(PeerError, match=r"ended with code 1 .*out of memory"):
            peer.run(request("end"))
        with pytest.raises(PeerError, match="ended with code 1"):
            peer.run(request())


def test_a_peer_that_hangs_is_given_up(tmp_path):
    peer = stub_peer(tmp_path, seconds=0.2, program="input()\ninput()")
    with peer, pytest.raises(PeerError, match="no answer within"):
        peer.load(LOAD)


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PeerError, match=r"absent.*name another program"):
        Peer("stub", [str(tmp_path / "absent")], tmp_path / "log")


def test_mode_options_are_checked():
    assert number({"k": "7"}, "k", 3) == 7
    assert number({}, "k", 3) == 3
    with pytest.raises(PeerFailure, match="whole number, got 'x'"):
        number({"k": "x"}, "k", 3)
    with pytest.raises(PeerFailure, match="Options of mode lookup are k, n, got 'm'"):
        only_options("lookup", {"k": "1", "m": "2"}, ("k", "n"))


@pytest.mark.parametrize(
    "name", [f"{peer}/{mode}" for peer, modes in MODES.items() for mode in modes]
)
def test_contenders_have_the_name_they_are_parsed_from(name):
    assert parse_contender(name).name == name


def test_contenders_keep_options_without_a_value():
    contender = parse_contender("ours/draft:k=4,auto")
    assert (contender.peer, contender.mode) == ("ours", "draft")
    assert contender.options == (("k", "4"), ("auto", ""))


@pytest.mark.parametrize("name", ["chess/plain", "ours", "llama.cpp/", ""])
def test_unknown_contenders_are_refused(name):
    with pytest.raises(RequestError, match="PEER/MODE"):
        parse_contender(name)


def test_our_plain_decoding_is_always_the_first_contender():
    named = choose_contenders([], ["llama.cpp/plain", "ours/ar"], plain_only=False)
    assert [one.name for one in named] == ["ours/ar", "llama.cpp/plain"]
    assert choose_contenders(["transformers"], [], plain_only=False)[0] == BASELINE
    plain = choose_contenders(["transformers", "llama.cpp"], [], plain_only=True)
    assert [one.name for one in plain] == ["ours/ar", "transformers/plain", "llama.cpp/plain"]


def test_speculation_on_random_weights_is_refused():
    with pytest.raises(RequestError, match=r"llama\.cpp/draft"):
        choose_contenders([], ["llama.cpp/plain", "llama.cpp/draft"], plain_only=True)


class Scripted:
    """A peer without a process: seconds by mode, and the order in which it was asked."""

    def __init__(self, seconds, log, tokens=None, broken=()):
        self.seconds, self.log, self.tokens, self.broken = seconds, log, tokens or {}, broken

    def run(self, request):
        self.log.append((request.prompt[0], request.mode))
        if request.mode in self.broken and request.prompt[0] > 1:
            raise PeerError("it broke.")
        tokens = self.tokens.get(request.mode, list(range(request.max_tokens)))
        return Answer(
            tokens=tokens,
            first_s=0.25,
            decode_s=self.seconds[request.mode].pop(0),
            decode_tokens=len(tokens) - 1,
            drafted=10,
            accepted=4,
        )


def contenders(*names):
    return [parse_contender(name) for name in names]


def measured(peers, names, prompts, max_tokens, rounds, progress=lambda line: None):
    """What was measured in the end."""
    nothing = Results(turns=dict.fromkeys(names, ()), failed={})
    *_, results = measure(peers, nothing, prompts, max_tokens, rounds, progress)
    return results


def test_contenders_take_turns_and_ratios_are_of_medians():
    log = []
    # The first value of each prompt is the unmeasured turn.
    ours = Scripted({"ar": [9.0, 2.0, 4.0, 3.0, 9.0, 1.0, 1.0, 1.0], "draft": [1.0] * 8}, log)
    other = Scripted({"plain": [9.0, 6.0, 6.0, 6.0, 9.0, 4.0, 4.0, 4.0]}, log)
    names = contenders("ours/ar", "llama.cpp/plain", "ours/draft")
    results = measured({"ours": ours, "llama.cpp": other}, names, [[1], [2]], 5, 3)
    modes = [
        (prompt, mode) for prompt in (1, 2) for _ in range(4) for mode in ("ar", "plain", "draft")
    ]
    assert log == modes
    record = summarise(results, None)
    plain = record["contenders"]["llama.cpp/plain"]
    assert plain["decode_tokens_per_s"] == pytest.approx(8 / 10)
    assert plain["decode_ratio_to_ours_ar"] == pytest.approx((8 / 10) / (8 / 4))
    assert plain["decode_ratio_to_ours_ar_spread"] == pytest.approx([1 / 4, 3 / 8, 1 / 2])
    assert plain["whole_s_spread"] == pytest.approx([4.25, 5.25, 6.25])
    assert (plain["num_draft_tokens"], plain["num_accepted_tokens"]) == (20, 8)
    assert plain["outputs_that_differ"] == 0
    assert record["contenders"]["ours/ar"]["fastest_decode_tokens_per_s"] == pytest.approx(8 / 3)
    best = record["best"]
    assert best["ours"]["contender"] == "ours/draft"
    assert best["llama.cpp"]["ours_over_it"] == pytest.approx(5.0)
    json.dumps(record)


def test_a_contender_that_breaks_is_left_out_with_its_reason():
    log, said = [], []
    seconds = {"ar": [1.0] * 9, "draft": [1.0] * 9, "ngram": [1.0] * 9}
    ours = Scripted(seconds, log, tokens={"ngram": [1, 2]}, broken=("draft",))
    names = contenders("ours/ar", "ours/draft", "ours/ngram")
    results = measured({"ours": ours}, names, [[1], [2], [3]], 4, 1, said.append)
    record = summarise(results, None)
    assert list(record["contenders"]) == ["ours/ar"]
    assert "it broke" in record["failed"]["ours/draft"]
    assert "should give 4 tokens, it gave 2" in record["failed"]["ours/ngram"]
    assert log.count((3, "draft")) == 0
    assert any("ours/draft left out" in line for line in said)


def test_without_our_plain_decoding_nothing_is_compared():
    ours = Scripted({"ar": [1.0] * 9}, [], broken=("ar",))
    with pytest.raises(PeerError, match="it broke"):
        measured({"ours": ours}, [BASELINE], [[2]], 4, 1)


def answer(tokens=None, text=None):
    return Answer(tokens=tokens, text=text, first_s=None, decode_s=1.0, decode_tokens=1)


def test_outputs_are_compared_by_token_or_else_by_character():
    reference = answer([7, 8, 9])
    assert common_length(answer([7, 8, 9]), reference, None) is None
    assert common_length(answer([7, 1, 9]), reference, None) == 1
    assert common_length(answer([7, 8]), reference, None) == 2

    def decode(ids):
        return "".join(chr(ord("a") + index) for index in ids)

    assert common_length(answer(text="hij"), reference, decode) is None
    assert common_length(answer(text="hij\ufffd"), reference, decode) is None
    assert common_length(answer(text="hix"), reference, decode) == 2
    assert common_length(answer(text="hij"), reference, None) == 0
