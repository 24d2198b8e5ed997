"""A model ready to run: configuration, weights on a device, tokenizer."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from ssd_jax.checkpointing import load_checkpoint, read_config
from ssd_jax.config import ModelConfig
from ssd_jax.errors import CheckpointError
from ssd_jax.hub import model_folder
from ssd_jax.jax_settings import check_jax_settings, first_device
from ssd_jax.memory import params_bytes, require_memory
from ssd_jax.text import Tokenizer, load_tokenizer
from ssd_jax.types import ModelParams

DTypeName = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """What `generate` runs; without a tokenizer it takes and gives token ids only.

    `unknown_ids` are rows of the embedding that no token of the tokenizer belongs to (many models
    pad theirs); they are never sampled.
    """

    config: ModelConfig
    params: ModelParams
    tokenizer: Tokenizer | None
    vocabulary: dict[str, int] = dataclasses.field(init=False, repr=False)
    unknown_ids: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        vocabulary = {} if self.tokenizer is None else self.tokenizer.vocabulary()
        object.__setattr__(self, "vocabulary", vocabulary)
        unknown = np.zeros(self.config.vocab_size, bool)
        if vocabulary:
            known = np.fromiter(vocabulary.values(), np.int64)
            unknown[:] = True
            unknown[known[known < self.config.vocab_size]] = False
        object.__setattr__(self, "unknown_ids", np.flatnonzero(unknown))


def load_model(folder: str | Path | None = None, dtype: DTypeName | None = None) -> Model:
    """The model in a converted or Hugging Face checkpoint folder; None is the bundled demo target.

    A name that is no folder is one on the Hugging Face hub, `OWNER/NAME` or `OWNER/NAME@REVISION`;
    see `hub.model_folder` for what is fetched then.

    `dtype` None keeps what the checkpoint stores, except on a CPU, where float32 decodes at least
    as fast as bfloat16 for one row and is what exactness is proved in: there it means float32.

    Raises:
        CheckpointError, ConfigError: see `hub.model_folder` and `checkpointing.load_checkpoint`.
        MemoryBudgetError: the weights do not fit the device.
    """
    path = demo_folder("target") if folder is None else model_folder(folder)
    check_jax_settings()
    device = first_device()
    if dtype is None and device.platform == "cpu":
        dtype = "float32"
    config = read_config(path)
    require_memory(
        f"Loading {config.num_params:,} weights from {path}",
        params_bytes(config, dtype or "bfloat16", own_output=device.platform == "cpu"),
        device,
        "free some, use dtype bfloat16, or choose a smaller model.",
    )
    loaded = load_checkpoint(path, dtype)
    params = loaded.params
    if device.platform == "cpu":
        params = transpose_output(params)
    return Model(config=loaded.config, params=params, tokenizer=load_tokenizer(path))


def transpose_output(params: ModelParams) -> ModelParams:
    """The weights with an output matrix [D V] of their own, where they use the embedding [V D].

    XLA's CPU backend transposes [V D] anew at every product with more than one row, which takes
    two to three times as long as the product. Costs V * D weights of memory.
    """
    if params.lm_head is not None:
        return params
    return dataclasses.replace(params, lm_head=jnp.array(params.embedding.T))


def demo_folder(role: Literal["target", "draft"]) -> Path:
    """Where the demo pair lies: inside the installed package, or beside it in the repository."""
    package = Path(__file__).parent
    for folder in (package / "demo" / role, package.parent / "checkpoints" / "demo" / role):
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"The demo {role} should be in {package / 'demo' / role}, but it is not there: reinstall "
        "ssd-jax, or name a checkpoint folder of your own."
    )
