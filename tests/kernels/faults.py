"""Kernels with faults put in, to see that the race detector or the values notice.

`without` takes one piece of synchronisation out, a `Slip` edits the source.
"""

import contextlib
import dataclasses
from unittest import mock

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.proof.interpret import run_case

WITHOUT_NAME = ("commit_tmem", "wait_load_tmem", "commit_smem", "wait_smem_to_gmem")
PRODUCT_WAIT = "wgmma wait"


def expected(fault):
    """How the interpreter must refuse a kernel with that fault; see `Outcome.detection`.

    Who no longer waits for a barrier runs ahead, and so may break the rule that somebody observes
    that barrier, or the next one, before there is a race to be seen.
    """
    if fault == PRODUCT_WAIT:
        return {"unfinished"}
    if fault == "wait_smem_to_gmem":
        return {"race", "unfinished"}
    return {"race", "barrier"} if fault.startswith(("wait ", "barrier ")) else {"race"}


@contextlib.contextmanager
def without(fault, owner, name="body"):
    """Kernels traced inside lack `fault`.

    Of a barrier, by its name among the scratch buffers of the function `owner.name`, which takes
    them by name or in one dictionary at the end: "wait NAME" leaves out its waits, "barrier NAME"
    its waits and its arrivals, and "commit NAME" lets its arrivals no longer wait for the tensor
    core. The names of `WITHOUT_NAME` leave out that call everywhere, and `PRODUCT_WAIT` the waits
    for products of wgmma where their sums are loaded.
    """
    what, _, barrier_name = fault.partition(" ")
    scratch_seen, skipped = {}, []
    body = getattr(owner, name)

    def watched_body(*arguments, **scratch):
        scratch_seen.update(scratch or next(x for x in arguments if isinstance(x, dict)))
        return body(*arguments, **scratch)

    def is_meant(barrier):
        return getattr(barrier, "ref", barrier) is scratch_seen[barrier_name]

    def without_barrier(do):
        def leave_out(barrier, *rest, **options):
            return skipped.append(what) if is_meant(barrier) else do(barrier, *rest, **options)

        return leave_out

    def commit(barrier, *rest, commit=plgpu.tcgen05_commit_arrive, arrive=plgpu.barrier_arrive):
        if is_meant(barrier):
            skipped.append(what)
            return arrive(barrier)
        return commit(barrier, *rest)

    def nothing(*_, **__):
        skipped.append(what)

    def load(accumulator, *, wait_n=0, load=plgpu.wgmma_accumulator_load):
        del wait_n
        skipped.append(what)
        return load(accumulator, wait_n=None)

    handshake = ("barrier_wait", "barrier_arrive", "tcgen05_commit_arrive")
    replacements = {
        "wait": {"barrier_wait": without_barrier(plgpu.barrier_wait)},
        "barrier": {one: without_barrier(getattr(plgpu, one)) for one in handshake},
        "commit": {"tcgen05_commit_arrive": commit},
        "wgmma": {"wgmma_accumulator_load": load},
        **{one: {one: nothing} for one in WITHOUT_NAME},
    }
    with (
        mock.patch.object(owner, name, watched_body),
        mock.patch.multiple(plgpu, **replacements[what]),
    ):
        yield
    if not skipped:
        raise ValueError(f"{fault!r} took nothing out of the kernel")


@dataclasses.dataclass(frozen=True)
class Slip:
    """A slip of the hand in a module: edits of its source, the case that sees it, and how.

    The edits are pairs of old and new, the case is one of those that the right kernel passes.
    """

    module: str
    edits: list[tuple[str, str]]
    case: str
    refusals: frozenset[str] = frozenset({"values"})

    def run(self, case, arguments, *, chip="sm_100"):
        """What becomes of a case of the edited kernel."""
        edited = {"module": self.module, "edits": self.edits, "of": case}
        return run_case("edited_cases:run", chip=chip, timeout=120.0, **edited, **arguments)


def how_refused(outcome, wrong, case):
    """`Outcome.detection`, or "values" if a case ran to its end and its figures are wrong."""
    if outcome.detection is None and outcome.error is None and wrong(outcome.figures, case):
        return "values"
    return outcome.detection
