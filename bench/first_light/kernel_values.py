"""Values of the Hopper kernels beside float64 on the host and the XLA reference on the device."""

import contextlib
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.first_light.problems import Problem, Solved, problems, solve
from pallas_kernels import decode_sm90, forward_sm90, reference
from pallas_kernels.decode_rows import kernels
from pallas_kernels.decode_splits import unsupported

# What rounding weights and outputs to 16 bit costs, with room; one key too many costs more in one
# of the loudnesses that problems have.
RMS = {"bfloat16": 4e-3, "float16": 8e-4}
LSE_ERROR = 2e-4
_LN2 = float(np.log(2))

type Tell = Callable[..., None]
type Call = Callable[[tuple[Any, ...], Any], tuple[jax.Array, jax.Array]]


def check(*, tell: Tell, dry_run: bool, op: str, first: int, last: int, shapes: int) -> None:
    """Problems first .. last - 1 of an op."""
    worst: dict[str, float] = {}
    with _device(dry_run):
        for problem in problems(op, shapes, tiny=dry_run)[first:last]:
            errors = _check(problem, hopper(problem, dry_run), tell, dry_run)
            worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    tell(f"{last - first} shapes", "worst " + _figures(worst), errors=worst)


def repeat(*, tell: Tell, dry_run: bool, op: str, times: int) -> None:
    """One problem many times over: every output must be the first one, bit for bit.

    A race that only sometimes loses shows here.
    """
    problem = problems(op, 20, tiny=dry_run)[-3]  # large, with several blocks in flight
    call = hopper(problem, dry_run)
    _check(problem, call, tell, dry_run)
    solved = solve(problem, jnp.dtype(problem.dtype))
    arguments = on_device(problem, solved)
    same = jax.jit(lambda one, other: jnp.all(one[0] == other[0]) & jnp.all(one[1] == other[1]))
    first = call(arguments, solved.page_table)
    equal = [same(first, call(arguments, solved.page_table)) for _ in range(times)]
    different = times - int(jnp.sum(jnp.stack(equal)))
    tell(str(problem), f"{different} of {times} repeats differ", ok=different == 0)


def not_a_number(*, tell: Tell, dry_run: bool) -> None:
    """A NaN in a key that some tokens see must reach exactly those, as in the reference."""
    for op in ("attention", "decode_attention", "verify_attention"):
        problem = problems(op, 20, tiny=dry_run)[6]
        solved = solve(problem, jnp.dtype(problem.dtype))
        table = solved.page_table
        query, keys, values, *others = on_device(problem, solved)
        first_page = 0 if table is None else int(table[0, 0])
        keys = keys.at[first_page, 0, 0].set(jnp.nan)  # slot 0 of the first row
        arguments = query, keys, values, *others
        out = hopper(problem, dry_run)(arguments, table)[0]
        expected = by_reference(problem)(arguments, table)
        wrong = int(jnp.sum(jnp.isnan(out) != jnp.isnan(expected)))
        tell(f"{op}: {problem}", f"{wrong} outputs differ in being NaN", ok=wrong == 0)


def triton(*, tell: Tell, dry_run: bool) -> None:
    """The Triton decode kernels, where jax-triton is there."""
    if importlib.util.find_spec("jax_triton") is None:
        tell("jax-triton", "not on this machine")
        return
    own = importlib.import_module("pallas_kernels.decode_triton").KERNELS
    for op in ("decode_attention", "verify_attention", "ancestor_attention"):
        for problem in problems(op, 20)[4:10:2]:

            def call(
                arguments: tuple[Any, ...],
                page_table: Any,  # noqa: ANN401
                problem: Problem = problem,
            ) -> tuple[jax.Array, jax.Array]:
                options = {"scale": problem.head_dim**-0.5, "page_table": page_table}
                reason = own[problem.op].unsupported(*arguments, **options)
                if reason is not None:
                    raise ValueError(reason)
                return own[problem.op].run(*arguments, **options), jnp.zeros(())

            _check(problem, call, tell, dry_run, with_lse=False, detail=False)


def hopper(problem: Problem, dry_run: bool) -> Call:
    """The Hopper kernel for a problem; returns its output and the natural LSE [B N T]."""
    scale, interpret = problem.head_dim**-0.5, None
    if dry_run:
        from pallas_kernels.proof.interpret import params

        interpret = params(detect_races=False)

    def prompt(arguments: tuple[Any, ...], page_table: None) -> tuple[jax.Array, jax.Array]:
        del page_table
        return forward_sm90.attention(
            *arguments,
            causal=problem.causal,
            scale=scale,
            soft_cap=None,
            window=None,
            interpret=interpret,
        )

    def cached(arguments: tuple[Any, ...], page_table: Any) -> tuple[jax.Array, jax.Array]:  # noqa: ANN401
        lses: list[jax.Array] = []

        def attend(*rows: Any, **options: Any) -> tuple[jax.Array, jax.Array]:  # noqa: ANN401
            out, lse = decode_sm90.attend(*rows, **options, interpret=interpret or False)
            lses.append(lse)
            return out, lse

        run = kernels(attend, unsupported)[problem.op].run
        out = run(*arguments, scale=scale, page_table=page_table)
        lse = lses[0].reshape(*lses[0].shape[:2], problem.tokens, problem.group) * _LN2
        return out, lse.swapaxes(2, 3).reshape(problem.batch, -1, problem.tokens)

    call = prompt if problem.op == "attention" else cached
    # The interpreter runs a kernel as it is traced.
    return call if dry_run else jax.jit(call)


def by_reference(problem: Problem) -> Callable[[tuple[Any, ...], Any], jax.Array]:
    """The XLA reference for a problem."""
    options: dict[str, Any] = {"scale": problem.head_dim**-0.5}
    if problem.op == "attention":
        options |= {"causal": problem.causal, "soft_cap": None, "window": None}

    @jax.jit
    def call(arguments: tuple[Any, ...], page_table: Any) -> jax.Array:  # noqa: ANN401
        if problem.op == "attention":
            return reference.attention(*arguments, **options)[0]
        run = getattr(reference, problem.op)
        return run(*arguments, page_table=page_table, **options)

    return call


def on_device(problem: Problem, solved: Solved) -> tuple[Any, ...]:
    """The arguments of a problem in the dtypes that the op takes."""
    low = jnp.dtype(problem.dtype)
    return tuple(
        None if x is None else jnp.asarray(x, low if x.dtype == np.float64 else x.dtype)
        for x in solved.arguments
    )


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error over that of what is expected; NaN stays NaN."""
    size = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / (size or 1.0))


def _check(
    problem: Problem,
    call: Call,
    tell: Tell,
    dry_run: bool,
    *,
    with_lse: bool = True,
    detail: bool = True,
) -> dict[str, float]:
    solved = solve(problem, jnp.dtype(problem.dtype))
    arguments = on_device(problem, solved)
    started = time.perf_counter()
    out, lse = jax.block_until_ready(call(arguments, solved.page_table))
    seconds = time.perf_counter() - started
    found = np.asarray(out, np.float64)
    errors = {"rms": relative_rms(found, solved.out)}
    right = errors["rms"] <= RMS[problem.dtype]
    if with_lse:
        blind, lse = np.isneginf(solved.lse), np.asarray(lse, np.float64)
        off = np.abs(np.where(blind, 0.0, lse) - np.where(blind, 0.0, solved.lse))
        errors["lse"] = float(np.max(off))
        right &= errors["lse"] <= LSE_ERROR and bool(np.all(np.isneginf(lse) == blind))
    if not dry_run:
        expected = by_reference(problem)(arguments, solved.page_table)
        errors["beside XLA"] = relative_rms(found, np.asarray(expected, np.float64))
        right &= errors["beside XLA"] <= 2 * RMS[problem.dtype]
    tell(str(problem), _figures(errors), ok=right, detail=detail, errors=errors, seconds=seconds)
    return errors


def _figures(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.2g}" for name, error in errors.items())


@contextlib.contextmanager
def _device(dry_run: bool) -> Iterator[None]:
    """In a dry run, kernels are traced as for a Hopper GPU and interpreted."""
    if not dry_run:
        yield
        return
    from pallas_kernels.proof import wgmma
    from pallas_kernels.proof.interpret import abstract_gpu

    with abstract_gpu("sm_90"), wgmma.modelled():
        yield
