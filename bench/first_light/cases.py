"""What the script runs, in order of value, and how long each case may take."""

import dataclasses
from typing import Any

STAGES = {
    "values": "do the kernels compute what the specification says",
    "engine": "does the engine emit the CPU's tokens",
    "kernel-speed": "kernels beside their peers and the memory's bandwidth",
    "decode-speed": "plain decoding beside the bandwidth bound",
    "ssd-speed": "SSD with the target on the GPU and the draft on the host's CPU",
    "extras": "Triton, overlap of dispatches, a race check by the vendor's tool",
}
OPS = (
    "attention",
    "decode_attention",
    "verify_attention",
    "ancestor_attention",
    "tree_attention",
)
_HERE = "bench.first_light"
SHAPES = 20  # random shapes of each kernel
_CHUNK = 6  # of which one process runs so many: a hang costs the others nothing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A function that a process of its own calls with its options.

    Attributes:
        stage: one of `STAGES`.
        name: unique within the stage.
        function: "package.module:function". It takes `tell`, which is handed one row of the
            result at a time, `dry_run`, and the options.
        options: what JSON can carry.
        limit_s: after so many seconds the process is killed.
        alone: nothing else runs beside it, because it takes times.
        interpreted: a dry run interprets kernels, which needs more threads than cores.
        sanitizer: the tool of compute-sanitizer that watches it, if any.
    """

    stage: str
    name: str
    function: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit_s: float = 120
    alone: bool = False
    interpreted: bool = False
    sanitizer: str | None = None


def all_cases(*, dry_run: bool) -> list[Case]:
    """Every case, the most valuable first; a dry run has fewer and smaller ones."""
    return [
        *_values(dry_run),
        *_engine(),
        *_kernel_speed(dry_run),
        *_decode_speed(dry_run),
        *_ssd_speed(dry_run),
        *_extras(dry_run),
    ]


def _values(dry_run: bool) -> list[Case]:
    shapes = 2 if dry_run else SHAPES
    found = [Case(stage="values", name="machine", function=f"{_HERE}.machine:describe", limit_s=60)]

    def chunk(op: str, first: int, last: int) -> Case:
        return Case(
            stage="values",
            name=f"{op} {first}-{last - 1}",
            function=f"{_HERE}.kernel_values:check",
            options={"op": op, "first": first, "last": last, "shapes": shapes},
            limit_s=170,
            interpreted=True,
        )

    # The smallest two of each kernel come first: what hangs at all is known within a minute.
    found += [chunk(op, 0, 2) for op in OPS]
    for first in range(2, shapes, _CHUNK):
        found += [chunk(op, first, min(first + _CHUNK, shapes)) for op in OPS]
    if not dry_run:
        found += [
            Case(
                stage="values",
                name=f"{op} repeated",
                function=f"{_HERE}.kernel_values:repeat",
                options={"op": op, "times": 1000},
            )
            for op in OPS
        ]
        found.append(
            Case(
                stage="values",
                name="NaN",
                function=f"{_HERE}.kernel_values:not_a_number",
                limit_s=150,
            )
        )
    return found


def _engine() -> list[Case]:
    return [
        Case(
            stage="engine", name="tokens, float32", function=f"{_HERE}.engine:tokens", limit_s=240
        ),
        Case(
            stage="engine", name="tokens, bfloat16", function=f"{_HERE}.engine:exact", limit_s=240
        ),
        Case(
            stage="engine",
            name="SSD with the draft on the CPU",
            function=f"{_HERE}.engine:split",
            limit_s=240,
        ),
    ]


def _kernel_speed(dry_run: bool) -> list[Case]:
    def case(name: str, function: str, limit_s: float, **options: Any) -> Case:  # noqa: ANN401
        return Case(
            stage="kernel-speed",
            name=name,
            function=f"{_HERE}.kernel_times:{function}",
            options=options,
            limit_s=limit_s,
            alone=True,
        )

    if dry_run:
        return [
            case("forward 64", "forward", 60, slots=64, batch=1),
            case("caches 128", "caches", 60, slots=128, batches=[1]),
        ]
    prompts = [
        case(f"forward {slots}", "forward", 90, slots=slots, batch=max(1, 16384 // slots))
        for slots in (8192, 32768, 2048)
    ]
    caches = [
        case(f"caches {slots}", "caches", 100, slots=slots, batches=batches, with_parts=True)
        for slots, batches in ((8192, [1, 16]), (32768, [1, 4, 16]), (131072, [1, 4, 16]))
    ]
    return [prompts[0], caches[0], prompts[1], caches[1], prompts[2], caches[2]]


def _decode_speed(dry_run: bool) -> list[Case]:
    sizes = ("tiny",) if dry_run else ("8B", "1B")
    return [
        Case(
            stage="decode-speed",
            name=f"Llama {size}",
            function=f"{_HERE}.decoding:passes",
            options={"size": size, "widths": [1, 4] if dry_run else [1, 4, 8, 16, 64, 2]},
            limit_s=300,
            alone=True,
        )
        for size in sizes
    ]


def _ssd_speed(dry_run: bool) -> list[Case]:
    drafts = ("tiny draft",) if dry_run else ("40M", "140M")
    return [
        Case(
            stage="ssd-speed",
            name=f"draft {draft}",
            function=f"{_HERE}.ssd_rounds:compare",
            options={
                "size": "tiny" if dry_run else "8B",
                "draft_size": draft,
                "draft_lens": [2] if dry_run else [4, 2],
            },
            limit_s=400,
            alone=True,
        )
        for draft in drafts
    ]


def _extras(dry_run: bool) -> list[Case]:
    found = [
        Case(
            stage="extras",
            name="dispatches",
            function=f"{_HERE}.dispatches:measure",
            limit_s=60,
            alone=True,
        )
    ]
    if dry_run:
        return found
    found.append(
        Case(stage="extras", name="Triton", function=f"{_HERE}.kernel_values:triton", limit_s=120)
    )
    found += [
        Case(
            stage="extras",
            name=f"{op} under {tool}",
            function=f"{_HERE}.kernel_values:check",
            options={"op": op, "first": 0, "last": 1, "shapes": SHAPES},
            limit_s=120,
            sanitizer=tool,
        )
        for op in ("attention", "decode_attention")
        for tool in ("racecheck", "synccheck")
    ]
    return found
