"""ssd-jax as one of the peers, so that it is measured by the same rules as the others.

Modes and options are those of `bench/methods.py`. Prefill ends when all models have read the
prompt; every token of the answer is decoded after that.
"""

import time
from pathlib import Path
from typing import Literal

import jax

from bench.methods import BenchMethod, parse_method
from bench.peers.protocol import Answer, Load, Loaded, PeerFailure, Run, serve
from ssd_jax import Model, SamplingParams, load_model
from ssd_jax.checkpointing import load_checkpoint
from ssd_jax.cli.environment import use_compilation_cache
from ssd_jax.engine.batch import make_requests
from ssd_jax.engine.counts import count_speculation
from ssd_jax.generation import choose_method


class Ours:
    """The models, once they are loaded, and the methods so far, whose tables take time to make."""

    def __init__(self) -> None:
        self._target: Model | None = None
        self._draft: Model | None = None
        self._methods: dict[str, BenchMethod] = {}

    def load(self, request: Load) -> Loaded:
        """Models from folders."""
        if request.dtype == "q8_0":
            raise PeerFailure("ssd-jax runs float32 or bfloat16, not q8_0.")
        use_compilation_cache(None)
        self._target = _read_model(request.target, request.dtype)
        if request.draft is not None:
            self._draft = _read_model(request.draft, request.dtype)
        return Loaded(versions={"jax": jax.__version__})

    def run(self, request: Run) -> Answer:
        """One answer."""
        if self._target is None:
            raise PeerFailure("A request came before the models were named.")
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
        speculation = self._method(request, params).speculation
        requests = make_requests(self._target, [request.prompt], params)
        method, batch = choose_method(self._target, requests, speculation)
        started = time.perf_counter()
        state = jax.block_until_ready(method.prefill(batch))
        prefilled = time.perf_counter()
        state = method.advance(batch, state, batch.max_steps)
        target, stats, _ = method.view(state)
        row = jax.device_get(target.tokens)[0]
        done = time.perf_counter()
        start = len(request.prompt)
        counts = None
        if speculation is not None and stats is not None:
            span = slice(start, start + request.max_tokens)
            counts = count_speculation(stats, None, 0, span, speculation).total
        return Answer(
            tokens=row[start : start + request.max_tokens].tolist(),
            first_s=prefilled - started,
            decode_s=done - prefilled,
            decode_tokens=request.max_tokens,
            drafted=None if counts is None else counts.num_draft_tokens,
            accepted=None if counts is None else counts.num_accepted_tokens,
        )

    def _method(self, request: Run, params: SamplingParams) -> BenchMethod:
        """The method of that name, made once."""
        parts = [f"{name}={value}" if value else name for name, value in request.options.items()]
        name = ":".join(filter(None, (request.mode, ",".join(parts))))
        if name not in self._methods:
            if self._target is None or (self._draft is None and request.mode not in _WITHOUT_DRAFT):
                raise PeerFailure(f"Method {name} needs a draft model, got none.")
            # Without a draft none of these methods looks at it.
            draft = self._draft or self._target
            method = parse_method(name, draft, draft)
            self._methods[name] = method.prepare(self._target, params, 1)
        return self._methods[name]


def _read_model(folder: str, dtype: Literal["float32", "bfloat16"]) -> Model:
    """The model in a folder, with a tokenizer if there is one."""
    if (Path(folder) / "tokenizer.json").is_file():
        return load_model(folder, dtype)
    loaded = load_checkpoint(Path(folder), dtype)
    return Model(config=loaded.config, params=loaded.params, tokenizer=None)


_WITHOUT_DRAFT = ("ar", "ngram", "wide")

if __name__ == "__main__":
    peer = Ours()
    serve(peer.load, peer.run)
