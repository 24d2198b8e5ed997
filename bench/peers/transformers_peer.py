"""Hugging Face transformers as a peer: plain greedy, assisted generation, prompt lookup.

Modes and options: `plain`; `draft` (`k` tokens a round and no early end, or without `k` the
library's own choice), `lookup` (`k` tokens at most, 10; `n` tokens to match, 2).
"""

import time
from typing import Any

from bench.peers.protocol import (
    Answer,
    Load,
    Loaded,
    PeerFailure,
    Run,
    number,
    only_options,
    serve,
)


class _Clock:
    """A streamer that notes when the first tokens came, and how many they were."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.first_tokens = 0
        self._is_prompt = True

    def put(self, tokens: Any) -> None:  # noqa: ANN401 (a tensor)
        """Called with the prompt, then with what each round gave."""
        if self._is_prompt:
            self._is_prompt = False
        elif self.first is None:
            self.first = time.perf_counter()
            self.first_tokens = tokens.numel()

    def end(self) -> None:
        """Called after the last tokens."""


class Transformers:
    """The models, once they are loaded."""

    def __init__(self) -> None:
        self._target: Any = None
        self._draft: Any = None

    def load(self, request: Load) -> Loaded:
        """Models from folders in the Hugging Face layout."""
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        if request.dtype == "q8_0":
            raise PeerFailure("transformers runs float32 or bfloat16, not q8_0.")
        torch.set_num_threads(request.threads)
        transformers.logging.set_verbosity_error()
        self._target = _read_model(request.target, request.dtype)
        if request.draft is not None:
            self._draft = _read_model(request.draft, request.dtype)
        return Loaded(
            versions={"transformers": transformers.__version__, "torch": torch.__version__}
        )

    def run(self, request: Run) -> Answer:
        """One answer; its first tokens may be several, those of the first round."""
        import torch  # pyright: ignore[reportMissingImports]

        settings = self._settings(request)
        clock = _Clock()
        prompt = torch.tensor([request.prompt])
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.max_tokens,
                min_new_tokens=None,
                do_sample=False,
                streamer=clock,
                **settings,
            )
        done = time.perf_counter()
        if clock.first is None:
            raise PeerFailure("transformers gave no tokens.")
        tokens = output[0, len(request.prompt) :].tolist()
        return Answer(
            tokens=tokens,
            first_s=clock.first - started,
            decode_s=done - clock.first,
            decode_tokens=len(tokens) - clock.first_tokens,
        )

    def _settings(self, request: Run) -> dict[str, Any]:
        """What the mode adds to `generate`."""
        options = request.options
        if request.mode == "plain":
            only_options("plain", options, ())
            return {}
        if request.mode == "lookup":
            only_options("lookup", options, ("k", "n"))
            return {
                "prompt_lookup_num_tokens": number(options, "k", 10),
                "max_matching_ngram_size": number(options, "n", 2),
            }
        if request.mode != "draft":
            raise PeerFailure(f"Modes of transformers: plain, draft, lookup; got {request.mode!r}.")
        only_options("draft", options, ("k",))
        if self._draft is None:
            raise PeerFailure("Mode draft needs a draft model, got none.")
        own = self._draft.generation_config
        if "k" in options:
            own.num_assistant_tokens = number(options, "k", 0)
            own.num_assistant_tokens_schedule = "constant"
            own.assistant_confidence_threshold = 0.0
        else:
            defaults = type(own)()
            own.num_assistant_tokens = defaults.num_assistant_tokens or 20
            own.num_assistant_tokens_schedule = defaults.num_assistant_tokens_schedule or "constant"
            own.assistant_confidence_threshold = defaults.assistant_confidence_threshold or 0.4
        return {"assistant_model": self._draft}


def _read_model(folder: str, dtype: str) -> Any:  # noqa: ANN401 (another library's)
    """A model that never takes a token for the end."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


if __name__ == "__main__":
    peer = Transformers()
    serve(peer.load, peer.run)
