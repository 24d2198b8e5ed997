"""Checkpoints: loading, converting, describing and exporting them."""

from ssd_jax.checkpointing.converter import convert as convert
from ssd_jax.checkpointing.export import export_hf as export_hf
from ssd_jax.checkpointing.inspect import describe as describe
from ssd_jax.checkpointing.load import LoadedCheckpoint as LoadedCheckpoint
from ssd_jax.checkpointing.load import load_checkpoint as load_checkpoint
from ssd_jax.checkpointing.load import read_config as read_config
