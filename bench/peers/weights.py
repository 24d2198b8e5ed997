"""The same weights for every engine: Hugging Face folders, and GGUF files made of them."""

import subprocess
from pathlib import Path
from shutil import copyfile

from bench.peers.client import PeerError, module_command, repository_environment
from ssd_jax.checkpointing import export_hf, load_checkpoint
from ssd_jax.config import ModelConfig
from ssd_jax.models.init import random_params
from ssd_jax.text import load_tokenizer

RANDOM_60M = ModelConfig(
    family="llama",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=2560,
    num_layers=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_context=4096,
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def hf_folder(folder: Path, work: Path) -> Path:
    """The folder itself if it has the Hugging Face layout, else a new one in `work` that has it.

    Raises:
        CheckpointError, ConfigError: no usable checkpoint.
    """
    if any(folder.glob("*.safetensors")):
        return folder
    loaded = load_checkpoint(folder)
    made = work / f"{folder.name}-hf"
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids) or None}
    export_hf(loaded.config, loaded.params, made, extra_config=ids)
    for name in _TOKENIZER_FILES:
        if (loaded.tokenizer_folder / name).is_file():
            copyfile(loaded.tokenizer_folder / name, made / name)
    return made


def random_folder(config: ModelConfig, work: Path) -> Path:
    """A folder with random weights in float32 and without a tokenizer."""
    made = work / "random"
    export_hf(config, random_params(config, 0, "float32"), made)
    return made


def gguf_file(folder: Path, file: Path, dtype: str, python: Path) -> Path:
    """The GGUF file of a Hugging Face folder, written by the Python that has `gguf`.

    Raises:
        PeerError: that failed.
    """
    command = module_command(python, "gguf_export", str(folder), str(file), "--dtype", dtype)
    try:
        done = subprocess.run(
            [*command, "--ids-only"], env=repository_environment(), capture_output=True, text=True
        )
    except OSError as error:
        raise PeerError(
            f"GGUF files are written by {python}, which cannot be run ({error.strerror}): name "
            "another with --gguf-python."
        ) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise PeerError(f"Writing {file.name} failed: {said}")
    return file
