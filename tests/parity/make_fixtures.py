"""Write the parity fixtures: small random checkpoints and what transformers computes with them.

Run by hand, in an environment of its own with torch and transformers (see README.md beside this
file); the tests only read what it wrote. Weights, prompts and the choice of seed are deterministic.
"""

import argparse
import copy
import dataclasses
import json
import logging
import math
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

PROMPT_LENS = (24, 17, 5)
PROBE_LEN = 8
GREEDY_LEN = 64
ROPE_LEN = 64
MAX_TOTAL_BYTES = 1_900_000

NUM_SPECIAL_IDS = 4
MIN_GREEDY_GAP = 4e-3
MIN_DISTINCT_TOKENS = 16
MIN_DISTINCT_TAIL_TOKENS = 6
TAIL_LEN = 16
LOGIT_STD_RANGE = (1.0, 3.0)
MAX_SEEDS = 2000

LOG = logging.getLogger("make_fixtures")

Arrays = dict[str, np.ndarray]
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One checkpoint: its family, its configuration, and how it is saved."""

    name: str
    family: str
    fields: Fields
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """A greedy continuation and, for each of its steps, the best logit less the second best."""

    tokens: np.ndarray
    gaps: np.ndarray


def build_cases() -> tuple[Case, ...]:
    """Return every case; the sizes keep all fixtures together under MAX_TOTAL_BYTES."""
    llama: Fields = {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    llama31: Fields = llama | {
        "head_dim": 32,
        "intermediate_size": 80,
        "tie_word_embeddings": True,
        "eos_token_id": [2, 3],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    llama_mha: Fields = llama | {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 80,
        "attention_bias": True,
        "mlp_bias": True,
    }
    llama_linear: Fields = llama | {
        "vocab_size": 176,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    }
    qwen: Fields = llama | {
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    qwen2: Fields = qwen | {"tie_word_embeddings": True}
    qwen2_5: Fields = qwen | {"hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 1}
    qwen3: Fields = qwen | {"head_dim": 16}
    qwen3_tied: Fields = qwen3 | {"tie_word_embeddings": True, "vocab_size": 192}
    return (
        Case(name="llama", family="llama", fields=llama),
        Case(name="llama31", family="llama", fields=llama31),
        Case(name="llama_mha", family="llama", fields=llama_mha),
        Case(name="llama_linear", family="llama", fields=llama_linear),
        Case(name="qwen2", family="qwen2", fields=qwen2),
        Case(name="qwen2_5_sharded", family="qwen2", fields=qwen2_5, max_shard_size="100KB"),
        Case(name="qwen3", family="qwen3", fields=qwen3),
        Case(name="qwen3_bf16", family="qwen3", fields=qwen3_tied, dtype=torch.bfloat16),
    )


def randomize(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
    """Fill every parameter so that no weight, norm or bias could be left out unnoticed.

    Projections of unit-size inputs come out with a standard deviation near 1.3, so attention is
    neither uniform nor one-hot and the layers outweigh the embedding; logits spread by about 2.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.4 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value = noise * (2.0 / math.sqrt(parameter.shape[-1]))
        else:
            value = noise * (1.3 / math.sqrt(parameter.shape[-1]))
        parameter.copy_(value)


def make_model(case: Case, seed: int) -> transformers.PreTrainedModel:
    """Return the case's random model, its weights rounded to the case's dtype, held in float32."""
    config = transformers.AutoConfig.for_model(case.family, **copy.deepcopy(case.fields))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(model, torch.Generator().manual_seed(seed))
    return model.to(dtype=case.dtype).to(dtype=torch.float32).eval()


def make_prompts(vocab_size: int, seed: int) -> list[torch.Tensor]:
    """Return one row of random ids, none of them special, for each of PROMPT_LENS."""
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    return [
        torch.randint(NUM_SPECIAL_IDS, vocab_size, (n,), generator=generator) for n in PROMPT_LENS
    ]


def compute_logits(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, V] of one unpadded row, computed without a cache."""
    return model(input_ids=ids[None], use_cache=False).logits[0]


def decode_greedily(model: transformers.PreTrainedModel, prompt: torch.Tensor) -> Greedy:
    """Return GREEDY_LEN greedy tokens after the prompt; end-of-text ids do not stop it."""
    ids = prompt
    gaps = []
    for _ in range(GREEDY_LEN):
        top = compute_logits(model, ids)[-1].topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        ids = torch.cat([ids, top.indices[:1]])
    return Greedy(
        tokens=ids[len(prompt) :].numpy().astype(np.int32), gaps=np.array(gaps, np.float32)
    )


def decode_greedily_cached(model: transformers.PreTrainedModel, prompt: torch.Tensor) -> np.ndarray:
    """Return the same tokens by transformers' own cached generation, as a cross-check."""
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=GREEDY_LEN)
    ids = model.generate(input_ids=prompt[None], generation_config=settings)  # pyright: ignore
    return ids[0, len(prompt) :].numpy().astype(np.int32)


def find_fault(greedy: Greedy) -> str | None:
    """Return why a continuation makes a poor fixture, or None."""
    if greedy.gaps.min() <= MIN_GREEDY_GAP:
        return "near tie"
    if len(set(greedy.tokens)) < MIN_DISTINCT_TOKENS:
        return "few distinct tokens"
    if len(set(greedy.tokens[-TAIL_LEN:])) < MIN_DISTINCT_TAIL_TOKENS:
        return "short loop"
    if greedy.tokens.min() < NUM_SPECIAL_IDS:
        return "special token"
    return None


def find_seed(case: Case) -> int:
    """Return the first seed with logits of good spread and three continuations without fault.

    Raises:
        RuntimeError: none of MAX_SEEDS seeds will do.
    """
    for seed in range(MAX_SEEDS):
        model = make_model(case, seed)
        prompts = make_prompts(case.fields["vocab_size"], seed)
        spread = float(compute_logits(model, prompts[0]).std())
        if not LOGIT_STD_RANGE[0] < spread < LOGIT_STD_RANGE[1]:
            continue
        if all(find_fault(decode_greedily(model, row)) is None for row in prompts):
            return seed
    raise RuntimeError(
        f"Expected a usable seed for {case.name} below {MAX_SEEDS}, found none: loosen a limit."
    )


def capture_activations(model: transformers.PreTrainedModel, ids: torch.Tensor) -> Arrays:
    """Return the float32 output of each module for one row; the README lists names and shapes.

    Queries and keys come out of their last module before rotation (the projection, or the head
    norm where the family has one) and are rotated by transformers' own function; the keys are
    then compared with those in transformers' cache.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    body: Any = model.model
    hooked: dict[str, Any] = {"embed": body.embed_tokens, "final_norm": body.norm}
    for i, layer in enumerate(body.layers):
        attention = layer.self_attn
        hooked |= {
            f"layer_{i}.input_norm": layer.input_layernorm,
            f"layer_{i}.q": getattr(attention, "q_norm", attention.q_proj),
            f"layer_{i}.k": getattr(attention, "k_norm", attention.k_proj),
            f"layer_{i}.attn_out": attention,
            f"layer_{i}.post_norm": layer.post_attention_layernorm,
            f"layer_{i}.mlp_out": layer.mlp,
            f"layer_{i}.out": layer,
        }
    handles = [module.register_forward_hook(keep(name)) for name, module in hooked.items()]
    cache = model(input_ids=ids[None], use_cache=True).past_key_values
    for handle in handles:
        handle.remove()

    head_dim = body.layers[0].self_attn.head_dim
    rotate = import_module(type(model).__module__).apply_rotary_pos_emb
    cos, sin = body.rotary_emb(seen["embed"], torch.arange(len(ids))[None])
    for i in range(len(body.layers)):
        q, k = (seen[f"layer_{i}.{x}"].view(1, len(ids), -1, head_dim) for x in "qk")
        q, k = rotate(q, k, cos, sin, unsqueeze_dim=2)
        torch.testing.assert_close(k, cache.layers[i].keys.transpose(1, 2), rtol=0, atol=0)
        seen |= {f"layer_{i}.q": q, f"layer_{i}.k": k}
    return {name: value[0].contiguous().numpy() for name, value in seen.items()}


def compute_rope_tables(model: transformers.PreTrainedModel) -> Arrays:
    """Return cos and sin [ROPE_LEN, head_dim / 2] for positions from 0.

    transformers repeats each table in the second half of the head; that half is checked and left
    out.
    """
    body: Any = model.model
    tables = body.rotary_emb(torch.zeros(1), torch.arange(ROPE_LEN)[None])
    halves = {}
    for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
        first, second = table[0].chunk(2, dim=-1)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        halves[name] = first.contiguous().numpy()
    return halves


def convert_config_to_v4(config: Fields, *, newest_rope_key: bool) -> Fields:
    """Return a config.json's content as transformers 4 wrote it.

    Four differences matter to a loader: `rope_theta` and `rope_scaling` in place of
    `rope_parameters`, `torch_dtype` in place of `dtype`, no `head_dim` where it follows from the
    other sizes, and for Qwen2 a `sliding_window` that `use_sliding_window` switches off.

    Args:
        config: what transformers 5 wrote.
        newest_rope_key: name the kind of scaling `rope_type` (since 4.43), not `type`.
    """
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(config["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    key = "rope_type" if newest_rope_key else "type"
    old["rope_scaling"] = None if kind == "default" else rope | {key: kind}
    old["torch_dtype"] = config["dtype"]
    old["transformers_version"] = "4.46.0"
    if config["model_type"] == "qwen2":
        old["sliding_window"] = 16
    if config["model_type"] == "llama" and (
        config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    ):
        del old["head_dim"]
    return dict(sorted(old.items()))


def write_v4_config(folder: Path) -> None:
    """Write config_v4.json beside config.json, after checking that transformers reads both alike.

    Raises:
        RuntimeError: the two describe different models.
    """
    new = json.loads((folder / "config.json").read_text())
    old = convert_config_to_v4(new, newest_rope_key=new["rope_parameters"]["rope_type"] == "llama3")
    config_type = type(transformers.AutoConfig.for_model(new["model_type"]))
    readings = [config_type.from_dict(copy.deepcopy(c)).to_dict() for c in (new, old)]
    for reading in readings:
        reading.pop("transformers_version", None)
        reading["rope_parameters"].pop("type", None)
    if readings[0] != readings[1]:
        raise RuntimeError(f"Expected both configs of {folder.name} to read alike: {readings}")
    (folder / "config_v4.json").write_text(json.dumps(old, indent=2) + "\n")


def write_case(case: Case, root: Path) -> None:
    """Write one case's folder; what is expected comes from the checkpoint read back in float32."""
    seed = find_seed(case)
    folder = root / case.name
    if folder.exists():
        shutil.rmtree(folder)
    stored: Any = make_model(case, seed)
    stored.to(dtype=case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)
    write_v4_config(folder)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = make_prompts(case.fields["vocab_size"], seed)
    greedy = [decode_greedily(model, row) for row in prompts]
    for row, result in zip(prompts, greedy, strict=True):
        np.testing.assert_array_equal(decode_greedily_cached(model, row), result.tokens)
    logits = [compute_logits(model, row).numpy() for row in prompts]

    arrays: Arrays = {
        "greedy_ids": np.stack([g.tokens for g in greedy]),
        "greedy_gaps": np.stack([g.gaps for g in greedy]),
        "probe_ids": prompts[0][:PROBE_LEN].numpy().astype(np.int32),
    }
    for i, (row, row_logits) in enumerate(zip(prompts, logits, strict=True)):
        arrays[f"prompt_{i}"] = row.numpy().astype(np.int32)
        arrays[f"logits_{i}"] = row_logits
    arrays |= compute_rope_tables(model)
    arrays |= capture_activations(model, prompts[0][:PROBE_LEN])
    summary = {
        "seed": seed,
        "logit_std": round(float(np.concatenate(logits).std()), 3),
        "min_greedy_gap": round(float(arrays["greedy_gaps"].min()), 5),
        "distinct_greedy_tokens": [len(set(g.tokens)) for g in greedy],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    save_file(arrays, folder / "expected.safetensors", metadata={"summary": json.dumps(summary)})
    size = sum(path.stat().st_size for path in folder.iterdir())
    LOG.info("%s: %d bytes, %s", case.name, size, json.dumps(summary))


def main() -> None:
    """Write every fixture, or those named on the command line.

    Raises:
        RuntimeError: all fixtures together are over MAX_TOTAL_BYTES.
    """
    cases = {case.name: case for case in build_cases()}
    parser = argparse.ArgumentParser(description="Write the parity fixtures.")
    parser.add_argument("names", nargs="*", help="cases to write; all when none is named")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent / "fixtures")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(cases))
    if unknown:
        parser.error(f"expected names among {', '.join(cases)}; got {', '.join(unknown)}")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name in args.names or cases:
        write_case(cases[name], args.root)
    total = sum(path.stat().st_size for path in args.root.rglob("*") if path.is_file())
    LOG.info("total: %d bytes", total)
    if total > MAX_TOTAL_BYTES:
        raise RuntimeError(f"Expected at most {MAX_TOTAL_BYTES} bytes of fixtures, wrote {total}.")


if __name__ == "__main__":
    main()
