"""config.json with odd values everywhere: what is accepted is what was asked, the rest a sentence.

Seeded: a case is its number. The verdict reads the accepted file anew, on its own.
"""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
from fuzz_cases import SLOW_COUNT, Raw, as_text, numbered

from ssd_jax.checkpointing.hf_loader import find_problems, open_hf_checkpoint
from ssd_jax.errors import SsdJaxError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
BASES = sorted(FIXTURES.glob("*/config*.json"))
MAX_MESSAGE = 400


VALUES = (
    None, True, False, "", "8", "silu", "x" * 5000, "\x00\x1b[2J", "\udc80", math.nan, math.inf,
    -math.inf, Raw("1e400"), -1, -7, 0, -0.0, 1, 2, 3, 7, 0.5, 2.5, 1e-45, 1e-300, 3.4e38, 1e39,
    20_000, 2**31 - 1, 2**31, 2**63, 10**12, 10**399, -(10**399), Raw("9" * 5000), [], [1], ["x"],
    [None] * 3, ["full_attention", "full_attention"], ["sliding_attention", "full_attention"],
    ["full_attention", []], {}, {"a": 1}, {"x" * 3000: {"y": ["z" * 3000]}},
    Raw("[" * 90 + "]" * 90), Raw("[" * 5000 + "]" * 5000), Raw('{"a":' * 5000 + "1" + "}" * 5000),
)  # fmt: skip
ROPE = ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings", "partial_rotary_factor", "attention_factor",
        "beta_fast", "mscale", "unheard_of")  # fmt: skip
KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")  # fmt: skip
MATHS = (*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias",
         "mlp_bias", "tie_word_embeddings", "model_type", "sliding_window", "max_window_layers",
         "use_sliding_window", "layer_types", "original_max_position_embeddings")  # fmt: skip
# Fields that would change the maths, and the only values with which they do not.
SWITCHES = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "logit_scale": (1,),
    "attn_logit_softcapping": (),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "num_experts": (0,),
    "pruned_heads": ({},),
    "is_encoder_decoder": (False,),
}
QUANTISED = ("quantization_config", "quantization")
HARMLESS = ("architectures", "torch_dtype", "use_cache", "eos_token_id", "initializer_range",
            "transformers_version", "temperature", "attention_dropout")  # fmt: skip
UNKNOWN = ("unheard_of", "x" * 5000, "\x1b[2J", "", "sliding_windows", "rope_thetas")
# What a message may call a field by instead; sizes follow from one another.
OTHER_NAMES = {
    "num_attention_heads": ("num_heads", "head_dim", "heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "hidden_size": ("head_dim",),
    "rope_scaling": ("RoPE", "rope"),
    "rope_parameters": ("RoPE", "rope"),
    "original_max_position_embeddings": ("rope", "RoPE"),
    "model_type": ("head_dim", "max_window_layers", "sliding_window"),
}


def damage(number):
    """The file of one case: its text, the fields that were changed, and the base."""
    chance = random.Random(number)
    base = chance.choice(BASES)
    fields = json.loads(base.read_text())
    if chance.random() < 0.06:
        return damaged_text(chance, json.dumps(fields)), None, base
    names = {}
    for _ in range(1 if chance.random() < 0.6 else 2):
        kind = chance.random()
        pool = MATHS if kind < 0.65 else tuple(SWITCHES) if kind < 0.8 else QUANTISED
        if kind > 0.84:
            pool = HARMLESS if kind < 0.94 else UNKNOWN
        name = chance.choice(pool)
        names[name] = value = chance.choice(VALUES)
        if name in ("rope_scaling", "rope_parameters") and chance.random() < 0.7:
            own = fields.get(name)
            value = dict(own) if isinstance(own, dict) else {}
            for _ in range(chance.choice((1, 1, 2, 4))):
                entry = chance.choice(ROPE)
                odd = chance.choice(KINDS) if "type" in entry else chance.choice(VALUES)
                value[entry] = odd
        if value is None and chance.random() < 0.5:
            fields.pop(name, None)
        else:
            fields[name] = value
    if names and chance.random() < 0.04:
        return twice(fields, next(iter(names))), tuple(names), base
    return as_text(fields), tuple(names), base


def twice(fields, name):
    """The file with a field that stands there twice, with two values."""
    first, second = as_text({name: "one value"}), as_text({**fields, name: 2})
    return first[:-1] + ", " + second[1:]


def damaged_text(chance, text):
    cut = chance.randrange(len(text))
    return chance.choice(
        (
            "", text[:cut], text + text, "[1]", "null", '"x"', "[" * 10_000, '{"a":' * 10_000,
            text[:cut] + "\udcff" + text[cut:], text[:cut] + "\x00" + text[cut:],
            "\ufeff" + text, text.replace(":", "="), "{" * 100_000, "9" * 100_000,
        )
    )  # fmt: skip


def verdict(number, folder):
    """What is wrong with how one case came out, None if nothing is."""
    text, names, base = damage(number)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for path in base.parent.glob("model*"):
        (folder / path.name).symlink_to(path)
    try:
        checkpoint = open_hf_checkpoint(folder)
        find_problems(checkpoint)
    except SsdJaxError as error:
        return about_message(str(error), names)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if names is None and text.strip("\ufeff") != json.dumps(json.loads(base.read_text())):
        return "damaged text was accepted"
    return about_config(checkpoint.config, json.loads(text))


def about_message(message, names):
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message)} characters: {message[:150]}"
    if not message.isprintable():
        return f"a message with control characters: {message!r}"
    if "config.json" not in message:
        return f"a message that does not name config.json: {message}"
    if message.startswith("Expected JSON"):  # it could not even be read
        return None
    called = [name for one in names or () for name in (one, *OTHER_NAMES.get(one, ()))]
    shown = [name for name in called if (name[:20] or "''") in message or not name.isprintable()]
    if names and not shown and not any(name in message for name in ROPE):
        return f"a message that does not name {[name[:40] for name in names]}: {message}"
    return None


def about_config(config, fields):
    """The file read anew, as transformers documents it."""
    fields = {name: value for name, value in fields.items() if value is not None}
    rope = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope |= {k: v for k, v in fields.get(name, {}).items() if v is not None}
    for name in SIZES:
        if name in fields and (type(fields[name]) is not int or not 0 < fields[name] < 2**31):
            return f"{name} = {fields[name]!r} was accepted"
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if type(fields.get(name, False)) is not bool:
            return f"{name} = {fields[name]!r} was accepted"
    heads, family = fields["num_attention_heads"], fields["model_type"]
    head_dim = 128 if family == "qwen3" else fields["hidden_size"] // heads
    bias = fields.get("attention_bias", False)
    theta = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    wanted = {
        "family": family,
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", head_dim),
        "max_context": fields["max_position_embeddings"],
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "qkv_bias": family == "qwen2" or bias,
        "output_bias": family != "qwen2" and bias,
        "mlp_bias": fields.get("mlp_bias", False),
        "qk_norm": family == "qwen3",
        "tied_embeddings": fields.get("tie_word_embeddings", False),
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            return f"{name} became {getattr(config, name)!r}, not {value!r}"
    if not (0 < config.rms_norm_eps < 1 and 1 <= config.rope_theta < 3.5e38):
        return f"eps {config.rms_norm_eps} and theta {config.rope_theta} were accepted"
    if config.num_layers > 10_000:
        return f"{config.num_layers} layers were accepted"
    return about_rope(config, rope, fields) or about_switches(config, fields)


def about_rope(config, rope, fields):
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = config.rope_scaling
    unknown = rope.keys() - set(ROPE[:7]) - {"partial_rotary_factor", "attention_factor", "mscale"}
    if unknown or any(rope.get(name, 1) != 1 for name in ("attention_factor", "mscale")):
        return f"RoPE with {rope} was accepted"
    if (scaling.kind if scaling else "default") != kind:
        return f"RoPE {kind!r} became {scaling}"
    if scaling is None:
        return None if rope.get("factor", 1) == 1 else f"factor {rope['factor']} had no effect"
    values = [scaling.factor]
    wanted = [rope["factor"]]
    if kind == "llama3":
        original = "original_max_position_embeddings"
        values += [scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_context]
        wanted += [rope["low_freq_factor"], rope["high_freq_factor"]]
        wanted += [rope.get(original, fields.get(original, fields["max_position_embeddings"]))]
    if values != wanted or bool in map(type, wanted):
        return f"RoPE {rope} became {scaling}"
    if not all(0 < value < 3.5e38 for value in values) or scaling.factor < 1:
        return f"{scaling} was accepted"
    return None


def about_switches(config, fields):
    for name, neutral in SWITCHES.items():
        value = fields.get(name)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
        ):
            return f"{name} = {value!r} was accepted"
    for name in UNKNOWN:
        if name in fields:
            return f"the unknown field {name[:20]!r} was accepted"
    for name in QUANTISED:
        if fields.get(name) not in (None, {}):
            return f"{name} = {fields[name]!r} was accepted"
    kinds = fields.get("layer_types", [])
    if any(kind != "full_attention" for kind in kinds):
        return f"layers {kinds} were accepted"
    window = fields.get("sliding_window", config.max_context)
    first = fields.get("max_window_layers", 0 if config.family == "llama" else 28)
    if fields.get("use_sliding_window") and not kinds and window < config.max_context:
        return None if first >= config.num_layers else f"a window of {window} was accepted"
    return None


def run(numbers, tmp_path):
    wrong = []
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        found = verdict(number, folder)
        if found is not None:
            wrong.append(f"input {number}: {found}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong[:40])


def test_odd_values_are_asked_for_or_refused(tmp_path):
    run(numbered(400), tmp_path)


@pytest.mark.slow
def test_ten_thousand_odd_values_are_asked_for_or_refused(tmp_path):
    run(numbered(SLOW_COUNT), tmp_path)


def test_the_cases_are_of_both_kinds(tmp_path):
    """Enough of them are accepted that the verdict on those means something."""
    accepted = 0
    for number in range(200):
        text, _, base = damage(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        for path in base.parent.glob("model*"):
            (folder / path.name).symlink_to(path)
        try:
            open_hf_checkpoint(folder)
            accepted += 1
        except SsdJaxError:
            pass
    assert 15 < accepted < 185
