"""How many clocks of an SM a step of a kernel must take, and how many its instructions ask for.

The bound follows from tile sizes alone: matrix products, exponentials, bytes of shared memory and,
where nothing is read twice, bytes of the GPU's memory, each at the SM's rate. What is achieved is
counted in the machine code of the loops: issue slots and special functions of all warps that share
a scheduler. Both are clocks of one step of one block, when every unit is busy and nothing waits; a
model for comparing kernels, not a prediction.
"""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.proof.ahead_of_time import CompiledKernel
from pallas_kernels.proof.sass import Counts
from pallas_kernels.proof.targets import Target

WARPGROUP_THREADS = 128
WARP = 32
EXP = "MUFU.EX2"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step must do, whatever the program."""

    mma_flops: int = 0
    exponentials: int = 0
    shared_bytes: int = 0
    memory_bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            mma_flops=self.mma_flops + other.mma_flops,
            exponentials=self.exponentials + other.exponentials,
            shared_bytes=self.shared_bytes + other.shared_bytes,
            memory_bytes=self.memory_bytes + other.memory_bytes,
        )

    def __mul__(self, times: int) -> "Work":
        return Work(
            mma_flops=times * self.mma_flops,
            exponentials=times * self.exponentials,
            shared_bytes=times * self.shared_bytes,
            memory_bytes=times * self.memory_bytes,
        )

    def clocks(self, target: Target) -> dict[str, float]:
        """Clocks that each unit of an SM is busy."""
        return {
            "mma": self.mma_flops / target.mma_flops_per_clock,
            "exp": self.exponentials / target.exp_per_clock,
            "shared": self.shared_bytes / target.shared_bytes_per_clock,
            "memory": self.memory_bytes / target.memory_bytes_per_clock,
        }

    def bound(self, target: Target) -> float:
        """The least clocks a step can take: those of the busiest unit."""
        return max(self.clocks(target).values())


def product(
    rows: int, columns: int, depth: int, *, left_in_shared: bool = True, sms: int = 1
) -> Work:
    """A product of 16-bit matrices; the right operand is in shared memory, mostly the left too.

    With two SMs that multiply together, each holds one half of the right operand.
    """
    read = columns * depth // sms + (rows * depth if left_in_shared else 0)
    return Work(mma_flops=2 * rows * columns * depth, shared_bytes=2 * read)


def copy(rows: int, columns: int) -> Work:
    """A 16-bit tile that arrives in shared memory."""
    return Work(shared_bytes=2 * rows * columns)


def forward_step(*, tiles: int, rows: int, keys: int, head_dim: int, sms: int = 1) -> Work:
    """Scores, weights and values of an SM's query tiles against one block of keys.

    The weights are the left operand of the second product and are not in shared memory.
    """
    one = product(rows, keys, head_dim, sms=sms)
    one = one + product(rows, head_dim, keys, left_in_shared=False, sms=sms)
    one = one + Work(exponentials=rows * keys)
    return one * tiles + copy(keys // sms, head_dim) * 2


def decode_step(*, tiles: int, rows: int, keys: int, head_dim: int, staged: bool) -> Work:
    """The same where every block of keys and values comes from the GPU's memory, once.

    Weights that are `staged` pass through shared memory.
    """
    read = Work(memory_bytes=copy(keys, head_dim).shared_bytes * 2)
    weights = copy(rows, keys) * (2 * tiles if staged else 0)
    return forward_step(tiles=tiles, rows=rows, keys=keys, head_dim=head_dim) + read + weights


def key_value_gradient_step(*, tile: int, head_dim: int) -> Work:
    """S^T, dP^T, dV and dK of one tile; queries and output gradients arrive."""
    scores = product(tile, tile, head_dim) * 2
    sums = product(tile, head_dim, tile, left_in_shared=False) * 2
    return scores + sums + Work(exponentials=tile * tile) + copy(tile, head_dim) * 2


def query_gradient_step(*, tile: int, head_dim: int) -> Work:
    """S, dP and dQ of one tile; keys and values arrive."""
    scores = product(tile, tile, head_dim) * 2
    sums = product(tile, head_dim, tile, left_in_shared=False)
    return scores + sums + Work(exponentials=tile * tile) + copy(tile, head_dim) * 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A kernel's step: its work and which warpgroups do it.

    Args:
        name: what it is called in tables.
        work: what a step of one block must do.
        exp_warpgroups: warpgroups whose loops take the exponentials.
        bodies: loops among which these warpgroups are spread evenly; the masked variants of a loop
            are longer and are counted apart.
        other_warpgroups: warpgroups that touch tensor memory without exponentials (rescaling).
        issue_warps: single warps that issue products.
    """

    name: str
    work: Work
    exp_warpgroups: int
    bodies: int = 1
    other_warpgroups: int = 0
    issue_warps: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Achieved:
    """Clocks of a step by the machine code, beside the bound."""

    bound: float
    work: dict[str, float]
    issue: float  # issue slots of a scheduler
    special: float  # special function unit
    exponentials_per_score: float

    @property
    def clocks(self) -> float:
        """Clocks of the busiest unit with the instructions that there are."""
        work = (self.work[unit] for unit in ("mma", "shared", "memory"))
        return max(self.issue, self.special, *work)


def exp_loops(loops: Sequence[Counts], bodies: int, *, masked: bool = False) -> list[Counts]:
    """The shortest `bodies` of the innermost loops that take exponentials of whole tiles.

    If `masked`, the longest of the others: those of key blocks that are seen in part.
    """
    most = max((loop[EXP] for loop in loops), default=0)
    # A masked loop may hold the code for two score buffers, of which a step takes one.
    whole = [loop for loop in loops if most and 2 * loop[EXP] >= most]
    whole.sort(key=lambda loop: loop.total)
    return whole[bodies:][-bodies:] if masked else whole[:bodies]


def issue_slots(
    kernel: CompiledKernel, softmax: Sequence[Counts], step: Step, target: Target
) -> float:
    """Issue slots of a scheduler in a step whose exponentials these loops take."""
    issue = sum(loop.total for loop in softmax) * step.exp_warpgroups / len(softmax)
    others = [loop for loop in kernel.hot_loops if not loop[EXP]]
    correcting = [loop for loop in others if loop["LDTM"] and not loop.matrix_products]
    issuing = [loop for loop in others if loop.matrix_products]
    if correcting:
        issue += sum(loop.total for loop in correcting) * step.other_warpgroups / len(correcting)
    # One warp sits on one of the schedulers: its slots are spread over all of them.
    return issue + sum(loop.total for loop in issuing) * step.issue_warps / target.schedulers


def achieved(kernel: CompiledKernel, step: Step, target: Target) -> Achieved:
    """What the loops of a kernel cost in a step."""
    softmax = exp_loops(kernel.hot_loops, step.bodies)
    warpgroups = step.exp_warpgroups
    special = sum(loop["MUFU"] for loop in softmax) * warpgroups / len(softmax)
    clocks = WARP * target.schedulers / target.exp_per_clock
    scores = step.work.exponentials / (WARPGROUP_THREADS * warpgroups)
    found = sum(loop[EXP] for loop in softmax) / len(softmax)
    return Achieved(
        bound=step.work.bound(target),
        work=step.work.clocks(target),
        issue=issue_slots(kernel, softmax, step, target),
        special=special * clocks,
        exponentials_per_score=found / scores,
    )


def row(kernel: CompiledKernel, step: Step, target: Target) -> dict[str, object]:
    """One line of the comparison; a tile is 128 x 128 scores."""
    found = achieved(kernel, step, target)
    masked = exp_loops(kernel.hot_loops, step.bodies, masked=True)
    return {
        "kernel": step.name,
        "target": target.name,
        "assembler": kernel.assembler,
        "registers": kernel.registers,
        "spilled": kernel.spill_store_bytes + kernel.spill_load_bytes,
        "shared": kernel.shared_bytes,
        "tensor_columns": kernel.tensor_columns,
        **{f"{unit}_clocks": round(clocks) for unit, clocks in found.work.items()},
        "bound": round(found.bound),
        "issue": round(found.issue),
        "masked_issue": round(issue_slots(kernel, masked, step, target)) if masked else "",
        "special": round(found.special),
        "exp_per_score": round(found.exponentials_per_score, 3),
        "issue_to_bound": round(found.issue / found.bound, 3),
        "clocks_to_bound": round(found.clocks / found.bound, 3),
        "clocks_per_tile": round(found.clocks * 128 * 128 / step.work.exponentials),
    }
