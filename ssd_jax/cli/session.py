"""What `generate` and `chat` begin with: JAX set up and a model in memory."""

import argparse

from ssd_jax.cli.busy import busy
from ssd_jax.cli.environment import use_compilation_cache
from ssd_jax.cli.model_name import named_folder
from ssd_jax.cpu_clients import can_split_cpu, split_cpu
from ssd_jax.errors import RequestError
from ssd_jax.model import Model, load_model
from ssd_jax.text import Tokenizer


def open_model(args: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """The model that the arguments name, and its tokenizer.

    This is where JAX starts. Speculative speculative decoding on a CPU gets its cores divided.
    """
    use_compilation_cache(args.compilation_cache)
    if args.method == "ssd" and args.draft_device == "auto" and can_split_cpu():
        split_cpu()
    folder = None if args.model is None else named_folder(args.model, quiet=args.quiet)
    with busy(f"loading {args.model or 'the demo model'}", quiet=args.quiet):
        model = load_model(folder, args.dtype)
    if model.tokenizer is None:
        raise RequestError("The command line needs a model with a tokenizer, got one without.")
    return model, model.tokenizer
