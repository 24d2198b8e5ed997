"""What `chat` and `generate --chat` share: a model's chat template and the sampling it asks for."""

import argparse
from collections.abc import Mapping
from typing import Any

from ssd_jax.cli.flags import sampling_options
from ssd_jax.cli.notes import note
from ssd_jax.errors import RequestError
from ssd_jax.text import Tokenizer
from ssd_jax.text.generation_config import FILE, recommended_sampling


def require_template(tokenizer: Tokenizer) -> str:
    """The model's chat template.

    Raises:
        RequestError: it has none.
    """
    if tokenizer.chat_template is None:
        raise RequestError(
            "Expected a model with a chat template, got one without; use `ssd-jax generate` "
            "without --chat."
        )
    return tokenizer.chat_template


def take_recommended(
    args: argparse.Namespace, tokenizer: Tokenizer, *, by_default: bool
) -> Mapping[str, Any]:
    """The sampling that the model's generation_config.json asks for, told on stderr.

    Nothing if the arguments, or without their word `by_default`, say no.

    Raises:
        CheckpointError: the file is malformed.
    """
    wanted = by_default if args.generation_config is None else args.generation_config
    if not wanted:
        return {}
    sampling = recommended_sampling(tokenizer.generation_config)
    given = sampling_options(args)
    used = {name: value for name, value in sampling.options.items() if name not in given}
    if (used or sampling.unused) and not args.quiet:
        note(_account(used, sampling.unused))
    return used


def _account(used: Mapping[str, Any], unused: tuple[str, ...]) -> str:
    words = ", ".join(f"{name} {value:g}" for name, value in used.items()) or "nothing"
    if used == {"temperature": 0}:
        words = "greedy"
    beside = f"; not used: {', '.join(unused)}" if unused else ""
    return f"sampling from {FILE}: {words}{beside} (--no-generation-config switches it off)"
