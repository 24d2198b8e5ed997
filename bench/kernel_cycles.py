"""Table of the attention kernels' machine code beside the least clocks a step can take.

Everything is compiled ahead of time, so no GPU is needed but the compiling environment is:
`pallas_kernels/proof/ahead_of_time.py` says how to build it, with tokamax for its kernels.

    SSD_JAX_AOT_PYTHON=.venv-aot/bin/python python -m bench.kernel_cycles --json cycles.json
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from pallas_kernels.proof import cycles
from pallas_kernels.proof.ahead_of_time import AheadOfTimeError, compile_case, missing
from pallas_kernels.proof.targets import B200, H200, Target

CASES = pathlib.Path(__file__).parents[1] / "tests" / "kernels"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A program to compile and what each of its kernels (by name, in order) does in a step."""

    case: str
    target: Target
    steps: dict[str, cycles.Step]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def entries() -> list[Entry]:
    """Our kernels and their peers at head dim 128, without a mask (which would add loops)."""
    blackwell = cycles.forward_step(tiles=2, rows=128, keys=128, head_dim=128)
    single = cycles.forward_step(tiles=1, rows=128, keys=128, head_dim=128)
    hopper = cycles.forward_step(tiles=2, rows=64, keys=128, head_dim=128)
    of_keys = cycles.key_value_gradient_step(tile=128, head_dim=128)
    of_query = cycles.query_gradient_step(tile=128, head_dim=128)
    step = cycles.Step

    def both(name: str, warpgroups: int) -> dict[str, cycles.Step]:
        return {
            "query": step(name=f"{name} dQ", work=of_query, exp_warpgroups=warpgroups),
            "key": step(name=f"{name} dK/dV", work=of_keys, exp_warpgroups=warpgroups),
        }

    return [
        Entry(
            case="forward_cases:compiled",
            target=B200,
            steps={
                "": step(
                    name="forward sm_100",
                    work=blackwell,
                    exp_warpgroups=2,
                    bodies=2,
                    other_warpgroups=1,
                )
            },
        ),
        Entry(
            case="bench.peer_kernels:tokamax_forward",
            target=B200,
            options={"chip": "sm100"},
            steps={
                "": step(
                    name="tokamax forward sm_100",
                    work=single,
                    exp_warpgroups=1,
                    other_warpgroups=1,
                )
            },
        ),
        Entry(case="backward_cases:compiled", target=B200, steps=both("backward sm_100", 2)),
        Entry(
            case="bench.peer_kernels:tokamax_backward",
            target=B200,
            steps=both("tokamax backward sm_100", 1),
        ),
        Entry(
            case="hopper_cases:compiled",
            target=H200,
            steps={"": step(name="forward sm_90", work=hopper, exp_warpgroups=2, issue_warps=0)},
        ),
        Entry(
            case="bench.peer_kernels:jax_hopper_forward",
            target=H200,
            steps={
                "": step(name="jax attention_mgpu", work=hopper, exp_warpgroups=2, issue_warps=0)
            },
        ),
        Entry(
            case="bench.peer_kernels:tokamax_forward",
            target=H200,
            options={"chip": "sm90"},
            steps={
                "": step(name="tokamax forward sm_90", work=hopper, exp_warpgroups=2, issue_warps=0)
            },
        ),
    ]


def measure(entry: Entry) -> list[dict[str, object]]:
    """The rows of a program's kernels; one that does not compile gets a row that says so."""
    try:
        kernels = compile_case(entry.case, entry.target, **entry.options)
    except AheadOfTimeError as error:
        message = str(error).strip().splitlines()[-1]
        return [{"kernel": step.name, "error": message} for step in entry.steps.values()]
    rows = []
    for part, step in entry.steps.items():
        found = [kernel for kernel in kernels if _is(kernel.name, part)]
        rows += [cycles.row(kernel, step, entry.target) for kernel in found]
    return rows


def _is(kernel: str, part: str) -> bool:
    """Whether a kernel's name is that of a part of a program; the key kernel is `..dkv..`."""
    of_key = "key" in kernel or "dkv" in kernel
    return part == "" or (part == "key") == of_key


def main() -> None:
    """Compile everything and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    if (reason := missing()) is not None:
        parser.error(reason)
    sys.path.insert(0, str(CASES))
    rows = [row for entry in entries() if arguments.only in entry.case for row in measure(entry)]
    columns = max(rows, key=len)
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row.get(column, "")) for column in columns), row.get("error", ""))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
