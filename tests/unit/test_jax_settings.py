"""JAX set up in ways that the engine's programs were not written for: one sentence."""

import os
import subprocess
import sys

import jax
import pytest
from tiny_models import tiny

from ssd_jax.errors import ConfigError
from ssd_jax.generation import generate
from ssd_jax.model import load_model
from ssd_jax.sampling_params import SamplingParams

SETTINGS = [("jax_enable_x64", True), ("jax_numpy_rank_promotion", "raise")]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_settings_that_change_programs_are_refused_by_name(name, value):
    model = tiny("qwen3").model
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(ConfigError, match=name):
            generate(model, [[1]], SamplingParams(max_tokens=1))
        with pytest.raises(ConfigError, match=name):
            load_model()
    finally:
        jax.config.update(name, before)
    assert generate(model, [[1]], SamplingParams(max_tokens=1))


def test_a_platform_that_is_not_installed_is_told_in_one_sentence():
    command = [sys.executable, "-m", "ssd_jax", "generate", "a", "--max-tokens", "1"]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "nowhere"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "nowhere" in line
    assert "set JAX_PLATFORMS" in line
