"""The one writer of JSON for people and records."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from ssd_jax.json_text import to_json

# What stays inside the program, or is another's format that is written as it was read.
OTHERS = {
    "ssd_jax/json_text.py",
    "ssd_jax/checkpointing/export.py",
    "ssd_jax/checkpointing/manifest.py",
    "ssd_jax/text/chat_template.py",
    "ssd_jax/text/prompt_file.py",
    "ssd_jax/tuning/kept_times.py",  # what is hashed
    "ssd_jax/tuning/tuned_file.py",
    "bench/convert_memory.py",
    "bench/first_light/processes.py",
    "bench/peers/client.py",
    "bench/peers/llama_cpp_peer.py",
    "ssd_jax/text/template_worker.py",  # what a template writes into a prompt
    "bench/peers/openai_peer.py",
    "bench/peers/protocol.py",
    "bench/peers/resuming.py",
}


def refuse(name):
    raise ValueError(name)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, np.float64(math.nan)])
def test_numbers_that_json_does_not_have_are_null(number):
    value = {"a": [1.5, (number, {"b": number})], "c": True, "d": None, "e": "Infinity"}
    read = json.loads(to_json(value), parse_constant=refuse)
    assert read == {"a": [1.5, [None, {"b": None}]], "c": True, "d": None, "e": "Infinity"}


def test_nobody_else_writes_json():
    root = Path(__file__).parents[2]
    writers = {
        str(path.relative_to(root))
        for folder in ("ssd_jax", "bench")
        for path in (root / folder).rglob("*.py")
        if re.search(r"\bjson\.dumps?\(", path.read_text(encoding="utf-8"))
    }
    assert writers <= OTHERS
