"""What is compared on: the models' folders and the prompts as ids."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.peers.weights import RANDOM_60M, hf_folder, random_folder
from ssd_jax.checkpointing.load import read_config
from ssd_jax.errors import RequestError
from ssd_jax.model import demo_folder
from ssd_jax.text import load_tokenizer

RANDOM_PROMPT_TOKENS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Models and prompts.

    Attributes:
        target: its folder in the Hugging Face layout.
        draft: the same of the draft; None means no speculation with a model.
        num_params: of the target.
        prompts: ids of each.
        decode_text: what makes text of ids, None without a tokenizer.
    """

    target: Path
    draft: Path | None
    num_params: int
    prompts: list[list[int]]
    decode_text: Callable[[Sequence[int]], str] | None


def open_inputs(args: argparse.Namespace, texts: Sequence[str], work: Path) -> Inputs:
    """The models and prompts that the command line names; folders that lack are made in `work`.

    Raises:
        CheckpointError, ConfigError: no usable checkpoint.
        RequestError: no prompt fits the target.
    """
    if args.random_model:
        shape = (args.num_prompts, RANDOM_PROMPT_TOKENS)
        ids = np.random.default_rng(0).integers(RANDOM_60M.vocab_size, size=shape)
        return Inputs(
            target=random_folder(RANDOM_60M, work),
            draft=None,
            num_params=RANDOM_60M.num_params,
            prompts=ids.tolist(),
            decode_text=None,
        )
    target = hf_folder(args.model or demo_folder("target"), work)
    tokenizer, config = load_tokenizer(target), read_config(target)
    encoded = [tokenizer.encode(text) for text in texts]
    fitting = [ids for ids in encoded if len(ids) + args.max_tokens <= config.max_context]
    if not fitting:
        raise RequestError(
            f"No prompt of {args.prompts} fits {config.max_context} tokens with {args.max_tokens} "
            "for the answer: lower --max-tokens or choose other prompts."
        )
    return Inputs(
        target=target,
        draft=hf_folder(args.draft_model or demo_folder("draft"), work),
        num_params=config.num_params,
        prompts=fitting[: args.num_prompts],
        decode_text=tokenizer.decode,
    )
