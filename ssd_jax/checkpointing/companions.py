"""The small files beside the weights: a tokenizer's, and the settings that name its special ids."""

from pathlib import Path

from ssd_jax.config import ModelConfig
from ssd_jax.errors import CheckpointError, RequestError, shown
from ssd_jax.json_files import is_file, shown_path
from ssd_jax.text import Tokenizer, load_tokenizer, render_chat

_TOKENIZER_FILE = "tokenizer.json"
_COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    _TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def companion_files(folder: Path) -> tuple[str, ...]:
    """Names of those files that a folder has."""
    return tuple(name for name in _COMPANION_FILES if is_file(folder / name))


def check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Refuse a tokenizer that could not serve the model; a folder without one is fine.

    Raises:
        CheckpointError: unreadable files, a token without a row in the model's embedding (but for
            one that only pads, which is never in a prompt), a chat template that does not compile.
    """
    if not is_file(folder / _TOKENIZER_FILE):
        return
    tokenizer = load_tokenizer(folder)
    padding = tokenizer.special_tokens.get("pad_token")
    for token, token_id in tokenizer.vocabulary().items():
        if token_id >= config.vocab_size and token != padding:
            raise CheckpointError(
                f"Expected the tokens of {shown_path(folder / _TOKENIZER_FILE)} to have ids below "
                f"the model's vocab_size {config.vocab_size}, got {token_id} for {shown(token)}; "
                "fetch the tokenizer that belongs to this model."
            )
    if tokenizer.chat_template is not None:
        _check_template(folder, tokenizer, tokenizer.chat_template)


def _check_template(folder: Path, tokenizer: Tokenizer, template: str) -> None:
    """Refuse a template that is no template; one that refuses our message is another matter."""
    try:
        render_chat(
            template,
            [{"role": "user", "content": "Hello"}],
            special_tokens=tokenizer.special_tokens,
        )
    except RequestError as error:
        if "syntax error" in str(error):
            raise CheckpointError(
                f"The chat template of {shown_path(folder)} cannot be used: {error}"
            ) from error
