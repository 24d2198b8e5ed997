"""Table of the attention kernels' machine code beside the least clocks a step can take.

Everything is compiled ahead of time, so no GPU is needed but the compiling environment is:
`pallas_kernels/proof/ahead_of_time.py` says how to build it, with tokamax for its kernels.

    SSD_JAX_AOT_PYTHON=.venv-aot/bin/python python -m bench.kernel_cycles --json cycles.json
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

from pallas_kernels.attention_config import forward_config, paired
from pallas_kernels.proof import cycles
from pallas_kernels.proof.ahead_of_time import AheadOfTimeError, compile_case, missing
from pallas_kernels.proof.targets import B200, H200, Target
from ssd_jax.json_text import to_json

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
    return [*_forward_b200(), *_backward_b200(), *_forward_h200(), *_decode()]


def _entry(case: str, target: Target, name: str, *, options: Any = None, **step: Any) -> Entry:  # noqa: ANN401
    return Entry(
        case=case,
        target=target,
        steps={"": cycles.Step(name=name, **step)},
        options=options or {},
    )


def _forward_b200() -> list[Entry]:
    ours, tokamax = "forward_cases:compiled", "bench.peer_kernels:tokamax_forward"
    two: dict[str, Any] = {"exp_warpgroups": 2, "bodies": 2, "other_warpgroups": 1}
    one: dict[str, Any] = {"exp_warpgroups": 1, "other_warpgroups": 1}
    pair = paired(forward_config(128))
    of_pair = {"pair": True, "kv_stages": pair.kv_stages, "registers": pair.registers}

    def work(tiles: int, sms: int) -> cycles.Work:
        return cycles.forward_step(tiles=tiles, rows=128, keys=128, head_dim=128, sms=sms)

    found = []
    for sms, name, options in ((1, "", {}), (2, ", 2 SMs together", of_pair)):
        peer = {"chip": "sm100", "collective": sms == 2}
        found += [
            _entry(ours, B200, f"forward sm_100{name}", options=options, work=work(2, sms), **two),
            _entry(
                tokamax,
                B200,
                f"tokamax forward sm_100{name}",
                options=peer,
                work=work(1, sms),
                **one,
            ),
        ]
    return found


def _backward_b200() -> list[Entry]:
    of_keys = cycles.key_value_gradient_step(tile=128, head_dim=128)
    of_query = cycles.query_gradient_step(tile=128, head_dim=128)

    def both(name: str, warpgroups: int) -> dict[str, cycles.Step]:
        return {
            "query": cycles.Step(name=f"{name} dQ", work=of_query, exp_warpgroups=warpgroups),
            "key": cycles.Step(name=f"{name} dK/dV", work=of_keys, exp_warpgroups=warpgroups),
        }

    tokamax = both("tokamax backward sm_100", 1)
    return [
        Entry(case="backward_cases:compiled", target=B200, steps=both("backward sm_100", 2)),
        Entry(case="bench.peer_kernels:tokamax_backward", target=B200, steps=tokamax),
    ]


def _forward_h200() -> list[Entry]:
    step: dict[str, Any] = {
        "work": cycles.forward_step(tiles=2, rows=64, keys=128, head_dim=128),
        "exp_warpgroups": 2,
        "issue_warps": 0,
    }
    peers = "bench.peer_kernels"
    sm90 = {"chip": "sm90"}
    return [
        _entry("hopper_cases:compiled", H200, "forward sm_90", **step),
        _entry(f"{peers}:jax_hopper_forward", H200, "jax attention_mgpu", **step),
        _entry(f"{peers}:tokamax_forward", H200, "tokamax forward sm_90", options=sm90, **step),
    ]


def _decode() -> list[Entry]:
    """Rows of one and of two tiles; a step is a block of 128 slots of the cache."""
    found = []
    for target, kernel, rows in ((B200, "sm_100", 128), (H200, "sm_90", 64)):
        for tiles, op, tokens in ((1, "decode", 1), (2, "ancestor", rows // 4 + 1)):
            staged = kernel == "sm_90"
            work = cycles.decode_step(tiles=tiles, rows=rows, keys=128, head_dim=128, staged=staged)
            options = {"kernel": kernel, "op": f"{op}_attention", "tokens": tokens}
            found.append(
                _entry(
                    "decode_cases:program",
                    target,
                    f"{'decode' if tiles == 1 else 'tree, 2 tiles'} {kernel}",
                    options=options,
                    work=work,
                    exp_warpgroups=tiles,
                    bodies=tiles,
                    issue_warps=0 if staged else 1,
                )
            )
    return found


def measure(entry: Entry) -> list[dict[str, object]]:
    """The rows of a program's kernels; one that does not compile gets a row that says so."""
    try:
        kernels = compile_case(entry.case, entry.target, **entry.options)
    except AheadOfTimeError as error:
        message = str(error).strip().splitlines()[-1]
        return [{"kernel": step.name, "error": message} for step in entry.steps.values()]
    rows = []
    kernels = [kernel for kernel in kernels if "combine_splits" not in kernel.name]  # no hot loop
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
        arguments.json.write_text(to_json(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
