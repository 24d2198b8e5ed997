"""A peer's process that answers what can be foretold."""

import sys
import textwrap

from bench.peers.client import Peer

PROGRAM = """
import sys
from bench.peers.protocol import Answer, Loaded, PeerFailure, serve

def load(request):
    print("an engine chats on stdout")
    return Loaded(versions={"stub": request.target})

def run(request):
    if request.mode == "refuse":
        raise PeerFailure("No such mode.")
    if request.mode == "raise":
        raise KeyError("weights")
    if request.mode == "end":
        sys.exit("out of memory")
    if request.mode == "hang":
        sys.stdin.readline()
    return Answer(
        tokens=[sum(request.prompt) + i for i in range(request.max_tokens)],
        first_s=0.5, decode_s=2.0, decode_tokens=request.max_tokens - 1,
    )

serve(load, run)
"""


def stub_peer(folder, seconds=60.0, program=PROGRAM):
    path = folder / "stub.py"
    path.write_text(textwrap.dedent(program))
    return Peer("stub", [sys.executable, str(path)], folder / "log", seconds=seconds)
