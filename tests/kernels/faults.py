"""Kernels with one piece of synchronisation taken out, to see that the race detector notices."""

import contextlib
from unittest import mock

from jax.experimental.pallas import mosaic_gpu as plgpu

WITHOUT_NAME = ("commit_tmem", "wait_load_tmem", "commit_smem", "wait_smem_to_gmem")


@contextlib.contextmanager
def without(fault, call):
    """Kernels traced inside lack `fault`.

    Of a barrier, by its name among the scratch buffers of `call.body`: "wait NAME" leaves out its
    waits, "barrier NAME" its waits and its arrivals, and "commit NAME" lets its arrivals no longer
    wait for the tensor core. The names of `WITHOUT_NAME` leave out that call everywhere.
    """
    what, _, name = fault.partition(" ")
    scratch_seen, skipped = {}, []
    body = call.body

    def watched_body(self, *arrays, **scratch):
        scratch_seen.update(scratch)
        return body(self, *arrays, **scratch)

    def is_meant(barrier):
        return getattr(barrier, "ref", barrier) is scratch_seen[name]

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

    handshake = ("barrier_wait", "barrier_arrive", "tcgen05_commit_arrive")
    replacements = {
        "wait": {"barrier_wait": without_barrier(plgpu.barrier_wait)},
        "barrier": {one: without_barrier(getattr(plgpu, one)) for one in handshake},
        "commit": {"tcgen05_commit_arrive": commit},
        **{one: {one: nothing} for one in WITHOUT_NAME},
    }
    with (
        mock.patch.object(call, "body", watched_body),
        mock.patch.multiple(plgpu, **replacements[what]),
    ):
        yield
    if not skipped:
        raise ValueError(f"{fault!r} took nothing out of the kernel")
