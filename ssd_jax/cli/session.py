"""What `generate` and `chat` begin with: JAX set up and a model in memory."""

import argparse
import sys

from ssd_jax.cli.environment import use_compilation_cache
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation, check_pair
from ssd_jax.errors import RequestError
from ssd_jax.model import Model, demo_folder, load_model
from ssd_jax.text import Tokenizer


def open_model(args: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """The model that the arguments name, and its tokenizer."""
    use_compilation_cache(args.compilation_cache)
    if sys.stderr.isatty() and not args.quiet:
        print(f"Loading {args.model or 'the demo model'} ...", file=sys.stderr)
    model = load_model(args.model, args.dtype)
    if model.tokenizer is None:
        raise RequestError("The command line needs a model with a tokenizer, got one without.")
    return model, model.tokenizer


def open_speculation(args: argparse.Namespace, model: Model) -> Speculation | None:
    """The speculation that the arguments ask for, its draft model loaded; None for none.

    Raises:
        RequestError: a draft model is named but not used, or none is named for an own model.
        ConfigError: target and draft do not go together.
    """
    method = args.method or ("draft" if args.draft_model else "ar")
    if method != "draft" and args.draft_model:
        raise RequestError(f"--method {method} uses no draft model: leave out --draft-model.")
    if method == "ar":
        return None
    given = {} if args.draft_len is None else {"draft_len": args.draft_len}
    if method == "ngram":
        most = {} if args.draft_len is None else {"max_draft": args.draft_len}
        ngram = NgramConfig(kind=args.ngram_kind, n=args.ngram_n, **most)
        return Speculation(draft=ngram, verification=args.verification)
    if args.model and not args.draft_model:
        raise RequestError("--method draft needs --draft-model for a model of your own.")
    draft = load_model(args.draft_model or demo_folder("draft"), args.dtype)
    check_pair(model, draft)
    return Speculation(draft=draft, verification=args.verification, **given)
