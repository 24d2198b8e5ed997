"""What `generate` and `chat` begin with: JAX set up and a model in memory."""

import argparse
import dataclasses
import sys

from ssd_jax.cli.environment import use_compilation_cache
from ssd_jax.cli.flags import AUTO
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.round_times import measure_pass_times, measure_round_times
from ssd_jax.engine.speculation import DEFAULT_DRAFT_LEN, Speculation, check_pair
from ssd_jax.errors import RequestError
from ssd_jax.model import Model, demo_folder, load_model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.text import Tokenizer

MOST_AUTO = 8  # most tokens that a draft model proposes with --draft-len auto


def open_model(args: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """The model that the arguments name, and its tokenizer."""
    use_compilation_cache(args.compilation_cache)
    if sys.stderr.isatty() and not args.quiet:
        print(f"Loading {args.model or 'the demo model'} ...", file=sys.stderr)
    model = load_model(args.model, args.dtype)
    if model.tokenizer is None:
        raise RequestError("The command line needs a model with a tokenizer, got one without.")
    return model, model.tokenizer


def open_speculation(
    args: argparse.Namespace, model: Model, params: SamplingParams
) -> Speculation | None:
    """The speculation that the arguments ask for, its draft model loaded; None for none.

    With `--draft-len auto` it comes with measured times, taken for these sampling options.

    Raises:
        RequestError: a flag that the method has no use for, or no draft for an own model.
        ConfigError: target and draft do not go together.
    """
    method = args.method or ("draft" if args.draft_model else "ar")
    uses_model, uses_ngrams = method in ("draft", "combined"), method in ("ngram", "combined")
    if args.draft_model and not uses_model:
        raise RequestError(f"--method {method} uses no draft model: leave out --draft-model.")
    if method == "ar" and args.synthetic_acceptance is not None:
        raise RequestError("--method ar drafts nothing: leave out --synthetic-acceptance.")
    if method == "ar" and not args.exact:
        return None
    draft = ngram = None
    auto = args.draft_len == AUTO
    draft_len = MOST_AUTO if auto else args.draft_len
    if uses_ngrams:
        ngram = NgramConfig(kind=args.ngram_kind, n=args.ngram_n)
        if draft_len is not None and not uses_model and not auto:
            ngram = dataclasses.replace(ngram, max_draft=draft_len)
    if uses_model:
        if args.model and not args.draft_model:
            raise RequestError(f"--method {method} needs --draft-model for a model of your own.")
        draft = load_model(args.draft_model or demo_folder("draft"), args.dtype)
        check_pair(model, draft)
    speculation = Speculation(
        draft=draft,
        ngram=ngram,
        draft_len=DEFAULT_DRAFT_LEN if draft_len is None else draft_len,
        verification=args.verification,
        exact=args.exact,
        synthetic_acceptance=args.synthetic_acceptance,
    )
    if args.exact and not args.quiet:
        print(_exactness_cost(model, speculation, params), file=sys.stderr)
    if not auto:
        return speculation
    times = measure_round_times(model, speculation, params)
    return dataclasses.replace(speculation, round_times=times)


def _exactness_cost(model: Model, speculation: Speculation, params: SamplingParams) -> str:
    (width,) = speculation.widths
    times = measure_pass_times(model, (1, width), params)
    return (
        f"exact: every pass takes {width} tokens, {times[width] / times[1]:.2f} times as long as a "
        f"pass of one ({times[1] * 1e3:.2f} ms)"
    )
