"""Trains the demo pair: first the target on text, then the draft on the target's own laws.

    python -m checkpoints.train_demo.train --data DATA --out RUN --pair small --stage target
    python -m checkpoints.train_demo.train --data DATA --out RUN --pair small --stage draft

DATA comes from `checkpoints.train_demo.data`. This one script runs on PyTorch and transformers (an
environment of its own: `pip install torch transformers safetensors tokenizers numpy rich`): on a
CPU with a bfloat16 matrix unit its training step was three to four times as fast as XLA's, and the
result is a Hugging Face checkpoint, which is what our users bring along, too.

Weights are kept in float32, the arithmetic is bfloat16. A stage can be stopped at any time and
goes on where it was when started again; with other `--steps` it follows that plan's learning rate
from there. The last part of each stage uses long windows, so that positions up to the context
limit are learnt.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints.train_demo.data import load_split, sample_batch

DOMAIN_WEIGHTS = {"math": 0.2, "prose": 0.35, "instruct": 0.15, "python": 0.3}
WARMUP_STEPS = 100
DECAY_SHARE = 0.4  # of the steps, at the end, over which the learning rate falls to zero
LONG_SHARE = 0.12  # of the steps, at the end, that use long windows
LONG_FACTOR = 4  # how much longer those windows are (and how many fewer there are in a batch)

# hidden size, layers, query heads, key/value heads, feed-forward size
SIZES = {
    "small": {"target": (256, 8, 4, 2, 768), "draft": (128, 2, 2, 1, 256)},
    "large": {"target": (512, 12, 8, 4, 1536), "draft": (192, 3, 3, 1, 576)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and on how much a stage trains: batch_size * seq_len tokens a step."""

    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    seed: int

    def batch_shape(self, step: int) -> tuple[int, int]:
        """Windows of a step and their length in tokens."""
        if step < self.steps * (1 - LONG_SHARE):
            return self.batch_size, self.seq_len
        return max(1, self.batch_size // LONG_FACTOR), self.seq_len * LONG_FACTOR

    def learning_rate_at(self, step: int) -> float:
        """Warm-up, constant, linear decay to zero."""
        decay_steps = max(1, int(self.steps * DECAY_SHARE))
        return self.learning_rate * min(
            1.0, (step + 1) / WARMUP_STEPS, (self.steps - step) / decay_steps
        )


def make_model(pair: str, role: str) -> LlamaForCausalLM:
    """A freshly initialised model of the given size."""
    hidden, layers, heads, kv_heads, intermediate = SIZES[pair][role]
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[0, 3],  # <|endoftext|> and <|end|>
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, Adam for embeddings and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def logits_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token logits [B, T, V], computed in bfloat16."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return model(tokens, use_cache=False).logits


def stage_loss(
    model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, windows: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the next tokens or divergence from the teacher's law, in nats a token."""
    tokens, labels = windows[:, :-1], windows[:, 1:]
    logits = logits_of(model, tokens).float().flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits, labels.flatten())
    with torch.no_grad():
        law = logits_of(teacher, tokens).float().flatten(0, 1).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), law, reduction="batchmean", log_target=True)


def train(pair: str, stage: str, plan: Plan, data: Path, out: Path, save_every: int) -> None:
    """Run a stage to its last step, from the newest state in `out` if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.seed)
    model = make_model(pair, stage).to(device)
    teacher = None
    if stage == "draft":
        teacher = LlamaForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
        teacher = teacher.to(device).requires_grad_(False)
    optimizers = make_optimizers(model)
    first = load_state(out / f"{stage}.pt", model, optimizers, device)
    arrays = load_split(data, "train")
    compiled_loss = torch.compile(stage_loss, dynamic=False)  # one program for each batch shape
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        (out / f"{stage}.log.jsonl").open("a") as log,
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task(stage, total=plan.steps, completed=first)
        total, count, started = 0.0, 0, time.perf_counter()
        for step in range(first, plan.steps):
            batch_size, seq_len = plan.batch_shape(step)
            windows = sample_batch(
                arrays,
                DOMAIN_WEIGHTS,
                step=step,
                seed=plan.seed,
                batch_size=batch_size,
                seq_len=seq_len,
            )
            windows = torch.from_numpy(windows).long().to(device)
            loss = compiled_loss(model, teacher, windows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = plan.learning_rate_at(step)
                optimizer.step()
                optimizer.zero_grad()
            total, count = total + loss.item(), count + 1
            last = step + 1 == plan.steps
            if count == 20 or last:
                seconds = time.perf_counter() - started
                rate = count * batch_size * seq_len / seconds
                record = {"step": step + 1, "loss_nats": total / count, "tokens_per_s": rate}
                log.write(json.dumps(record) + "\n")
                log.flush()
                progress.update(bar, description=f"{stage} loss {total / count:.3f}")
                total, count, started = 0.0, 0, time.perf_counter()
            if (step + 1) % save_every == 0 or last:
                save_state(out / f"{stage}.pt", model, optimizers, step + 1)
            progress.update(bar, completed=step + 1)
    model.save_pretrained(out / stage)


def save_state(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Write everything a resumed run needs; a reader sees the old file or the new one."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], device: str
) -> int:
    """Restore a saved state if there is one; the number of steps already done."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def main() -> None:
    """Train one stage as the command line asks."""
    parser = argparse.ArgumentParser(description="Train the demo pair, one stage at a time.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by .data")
    parser.add_argument("--out", type=Path, required=True, help="folder of states and results")
    parser.add_argument("--pair", choices=sorted(SIZES), default="small", help="sizes (small)")
    parser.add_argument("--stage", choices=("target", "draft"), required=True)
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (3000)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows a step (32)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a window (256)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak (0.003)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (0)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saves (100)")
    args = parser.parse_args()
    plan = Plan(
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.pair, args.stage, plan, args.data, args.out, args.save_every)


if __name__ == "__main__":
    main()
