"""Prefill attention against a naive one, and the choice of implementations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import ops, reference, registry

B, T, S, N, K, H = 2, 6, 10, 4, 2, 8
LENGTHS, START = jnp.array([7, 0], jnp.int32), jnp.array([3, 1], jnp.int32)
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "causal from start": {"causal": True, "start": START},
    "ragged": {"lengths": LENGTHS},
    "everything": {
        "causal": True,
        "start": START,
        "lengths": LENGTHS,
        "window": 3,
        "soft_cap": 2.0,
        "scale": 0.7,
    },
}


def make_inputs(seed=0):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((B, T, N, H), np.float32)
    key, value = rng.standard_normal((2, B, S, K, H), np.float32)
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)


def naive(query, key, value, *, causal=False, start=0, lengths=S, window=S + T, soft_cap=None, **o):
    """Repeated kv heads and one dense mask; differentiable by JAX itself."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * o.get("scale", 1 / math.sqrt(H))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    position = jnp.broadcast_to(start, B)[:, None, None] + np.arange(T)[:, None]
    slot = np.arange(S)
    seen = (slot < jnp.broadcast_to(lengths, B)[:, None, None]) & (slot > position - window)
    seen = (seen & (slot <= position) if causal else seen)[:, None]
    weights = jnp.where(seen, jnp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total == 0, 1, total), value)
    return out, jnp.log(total)[..., 0]


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_lse(case):
    inputs = make_inputs()
    options = CASES[case]

    @jax.jit
    def every_way(*inputs):
        both = pallas_kernels.attention_with_lse(*inputs, **options)
        return naive(*inputs, **options), both, pallas_kernels.attention(*inputs, **options)

    (out, lse), (got, got_lse), alone = every_way(*inputs)
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(alone, got)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    inputs = make_inputs()
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.standard_normal((B, T, N, H), np.float32))
    options = CASES[case]

    def loss(attention):
        return lambda *inputs: jnp.sum(attention(*inputs, **options) * weight)

    expected = jax.jit(jax.grad(loss(lambda *i, **o: naive(*i, **o)[0]), (0, 1, 2)))(*inputs)
    got = jax.jit(jax.grad(loss(pallas_kernels.attention), (0, 1, 2)))(*inputs)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "causal from start"])
def test_gradients_of_the_lse(case):
    """Losses on the LSE (a regulariser of logits, or a merge of parts) reach query and key."""
    inputs = make_inputs()
    weight = np.random.default_rng(1).standard_normal((B, N, T), np.float32)

    def loss(attention):
        def total(*inputs):
            out, lse = attention(*inputs, **CASES[case])
            return jnp.sum(lse * weight) + jnp.sum(out**2)

        return total

    expected = jax.jit(jax.grad(loss(naive), (0, 1, 2)))(*inputs)
    got = jax.jit(jax.grad(loss(pallas_kernels.attention_with_lse), (0, 1, 2)))(*inputs)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def gradient_by(implementation, monkeypatch, backward):
    """The gradient, where "fake" has a forward pass and what is given as backward."""
    fake = dataclasses.replace(FAKE, module="pallas_kernels.reference")
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "attention", (fake, FAKE))
    offered = (*backward, registry.IMPLEMENTATIONS["attention_backward"][-1])
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "attention_backward", offered)

    def loss(query, key, value):
        return pallas_kernels.attention(query, key, value, implementation=implementation).sum()

    return jax.grad(loss)(*make_inputs())


def test_gradients_are_computed_by_the_named_implementation(monkeypatch):
    zeros = dataclasses.replace(FAKE, module=__name__)
    np.testing.assert_array_equal(gradient_by("fake", monkeypatch, [zeros]), 0)
    other = dataclasses.replace(zeros, name="other")
    assert gradient_by(None, monkeypatch, []).any()
    with pytest.raises(
        pallas_kernels.UnsupportedError,
        match="'fake' of attention has no gradients: to differentiate, name one of other, xla, or",
    ):
        gradient_by("fake", monkeypatch, [other])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be at least 1 slot, got 0"),
        ({"soft_cap": 0.0}, "soft_cap must be positive, got 0"),
        ({"implementation": "none such"}, "attention has no implementation 'none such'.*xla"),
    ],
)
def test_meaningless_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        pallas_kernels.attention(*make_inputs(), **options)


def test_heads_that_do_not_divide_are_refused():
    query, key, value = make_inputs()
    with pytest.raises(ValueError, match="multiple of the kv heads, got 3 and 2"):
        pallas_kernels.attention(query[:, :, :3], key, value)


def doubled(query, keys, values, lengths, *, scale, page_table):
    assert page_table is None
    return 2 * reference.decode_attention(query, keys, values, lengths, scale=scale)


def refuses_wide_heads(query, *others, scale, page_table):
    del others, scale, page_table
    return f"takes head dims up to 8, got {query.shape[-1]}" if query.shape[-1] > 8 else None


def no_gradients(query, key, value, *others, **options):
    del others, options
    return jnp.zeros_like(query), jnp.zeros_like(key), jnp.zeros_like(value)


KERNELS = {
    "decode_attention": registry.Kernel(run=doubled, unsupported=refuses_wide_heads),
    "attention_backward": registry.Kernel(
        run=no_gradients, unsupported=registry.supports_everything
    ),
}
FAKE = registry.Implementation(name="fake", module=__name__)


@pytest.fixture
def with_fake(monkeypatch):
    """An implementation before XLA's that gives twice the values, so that one sees that it ran."""
    offered = (FAKE, *registry.IMPLEMENTATIONS["decode_attention"])
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "decode_attention", offered)


def decode(head_dim, **options):
    keys = jnp.ones((1, 1, 4, head_dim))
    lengths = jnp.array([3], jnp.int32)
    query = jnp.ones((1, 2, head_dim))
    return np.asarray(pallas_kernels.decode_attention(query, keys, keys, lengths, **options))


def test_a_named_implementation_runs(with_fake):
    np.testing.assert_array_equal(decode(8, implementation="fake"), 2)
    np.testing.assert_array_equal(decode(8, implementation="xla"), 1)


def test_a_named_implementation_says_why_it_cannot(with_fake):
    with pytest.raises(pallas_kernels.UnsupportedError, match="takes head dims up to 8, got 16"):
        decode(16, implementation="fake")


def test_the_first_that_fits_is_chosen(with_fake):
    chip = registry.chip_of(jax.devices()[0])
    offered = registry.IMPLEMENTATIONS["decode_attention"]

    def choice(head_dim):
        query = jax.ShapeDtypeStruct((1, 2, head_dim), jnp.float32)
        arguments = (query, query, query, None), {"scale": 1.0, "page_table": None}
        return registry.choose(offered, "decode_attention", chip, *arguments, None).name

    assert (choice(8), choice(16)) == ("fake", "xla")
    np.testing.assert_array_equal(decode(8), 2)
    np.testing.assert_array_equal(decode(16), 1)


def jitted_decode(head_dim):
    keys, query = jnp.ones((1, 1, 4, head_dim)), jnp.ones((1, 2, head_dim))
    run = jax.jit(lambda *arrays: pallas_kernels.decode_attention(*arrays))
    return np.asarray(run(query, keys, keys, jnp.array([3], jnp.int32)))


def test_beside_a_gpu_a_program_on_a_cpu_runs_what_a_cpu_can(with_fake, monkeypatch):
    for_gpus = dataclasses.replace(FAKE, platform="gpu")
    offered = (for_gpus, *registry.IMPLEMENTATIONS["decode_attention"][1:])
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "decode_attention", offered)
    monkeypatch.setattr(ops, "target_chip", lambda: HOPPER)
    np.testing.assert_array_equal(jitted_decode(8), 1)


@pytest.mark.parametrize("named", [False, True])
def test_a_program_for_another_platform_runs_what_it_can(with_fake, named):
    """Exported from a CPU for CUDA: the reference, unless a mesh says which GPU it is for."""
    for_gpus = dataclasses.replace(FAKE, platform="gpu", capabilities=((9, 0),))
    offered = (for_gpus, *registry.IMPLEMENTATIONS["decode_attention"][1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.IMPLEMENTATIONS, "decode_attention", offered)
        cache = jax.ShapeDtypeStruct((1, 1, 256, 8), jnp.bfloat16)
        shapes = jax.ShapeDtypeStruct((1, 2, 8), jnp.bfloat16), cache, cache
        shapes = *shapes, jax.ShapeDtypeStruct((1,), jnp.int32)
        device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu") if named else None
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            lowered = jax.jit(lambda *arrays: pallas_kernels.decode_attention(*arrays))
            text = jax.export.export(lowered, platforms=["cuda"])(*shapes).mlir_module()
    assert "stablehlo.while" not in text  # the blocks of a CPU
    assert ("2.000000e+00" in text) == named


def test_arrays_say_which_device_they_are_on():
    first, second = jax.devices()[:2]
    x = jax.device_put(jnp.ones(3), second)
    assert registry.device_of((x, None, 1.0)) == second
    assert registry.device_of(()) is None
    seen = []
    jax.jit(lambda x: seen.append(registry.device_of((x, jnp.ones(3)))))(x)
    assert seen == [None]
    assert first != second


def test_what_a_traced_program_is_for(monkeypatch):
    """The mesh comes before the default device."""

    def chip_of(device):
        return dataclasses.replace(registry.CPU, kind=str(device))

    monkeypatch.setattr(registry, "chip_of", chip_of)

    def target():
        return registry.target_chip().kind

    first, *_, last = jax.devices()
    assert target() == str(first)
    with jax.default_device(last):
        assert target() == str(last)
        named = jax.sharding.AbstractDevice("NVIDIA B200", 148, "gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=named)
        with jax.sharding.use_abstract_mesh(mesh):
            assert target() == str(named)
    with jax.default_device("cpu"):
        assert target() == str(first)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA L4", (8, 9)),
        ("a GPU of tomorrow", None),
    ],
)
def test_a_gpu_that_is_not_there_is_known_by_its_name(name, capability):
    device = jax.sharding.AbstractDevice(name, None, "gpu")
    assert registry.chip_of(device).capability == capability


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "xla_blocks"), ("float32", "xla")])
def test_a_cpu_reads_16_bit_caches_in_blocks(dtype, name):
    cache = jax.ShapeDtypeStruct((1, 2, 256, 64), dtype)
    arrays = jax.ShapeDtypeStruct((1, 4, 64), dtype), cache, cache, None
    options = {"scale": 1.0, "page_table": None}
    offered = registry.IMPLEMENTATIONS["decode_attention"]
    chosen = registry.choose(offered, "decode_attention", registry.CPU, arrays, options, None)
    assert chosen.name == name


HOPPER = registry.Chip(platform="gpu", kind="NVIDIA H200", capability=(9, 0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"capabilities": ((9, 0), (8, 0))}, None),
        (
            {"capabilities": ((10, 0),)},
            "needs a GPU of sm_100, and this device is NVIDIA H200 (sm_90)",
        ),
        ({"platform": "cpu"}, "is for cpus, and this device is NVIDIA H200 (sm_90)"),
        ({"needs": "no_such_package"}, "needs the package no_such_package, which is not installed"),
    ],
)
def test_reasons_of_chips(changes, reason):
    assert dataclasses.replace(FAKE, **changes).unsupported_chip(HOPPER) == reason


def test_a_gpu_with_a_jax_that_ignores_register_budgets_is_told_to_take_another(monkeypatch):
    def answers(version):
        monkeypatch.setattr(jax, "__version__", version)
        return {
            one.name: one.unsupported_chip(HOPPER)
            for one in registry.IMPLEMENTATIONS["attention"]
            if "sm100" not in one.name and one.name != "xla_blocks"
        }

    assert answers("0.11.2") == {"mosaic_sm90": None, "xla": None}
    told = answers("0.12.0.1")
    assert told["xla"] is None
    for part in ("JAX 0.11", "0.12.0.1", "nvJitLink", 'pip install "jax[cuda13]==0.11.2"'):
        assert part in told["mosaic_sm90"]


def test_every_implementation_has_a_kernel_and_explains_itself():
    rows = pallas_kernels.explain(jax.devices()[0])
    assert {op for op, _, _ in rows} == set(registry.IMPLEMENTATIONS)
    for op, implementations in registry.IMPLEMENTATIONS.items():
        assert implementations[-1].name == "xla"
        assert sum(status == "chosen" for name, _, status in rows if name == op) == 1
    assert ("decode_attention", "xla_blocks", "chosen") in rows
    assert ("decode_attention", "xla", "next choice") in rows


@pytest.mark.parametrize("op", registry.IMPLEMENTATIONS)
def test_registered_modules_implement_their_ops(op):
    """Those whose packages are here: the table names modules that are only imported when chosen."""
    for implementation in registry.IMPLEMENTATIONS[op]:
        if implementation.needs is None:
            assert callable(implementation.kernel(op).run)


def test_a_gpu_is_offered_its_kernels(monkeypatch):
    """What each chip would run first, where no package is missing and JAX assembles them well."""
    monkeypatch.setattr(jax, "__version__", f"{registry.MOSAIC_JAX}.2")
    chips = {"B200": (10, 0), "H200": (9, 0), "A100": (8, 0)}

    def first(op, name):
        chip = registry.Chip(platform="gpu", kind=name, capability=chips[name])
        return next(
            one.name
            for one in registry.IMPLEMENTATIONS[op]
            if dataclasses.replace(one, needs=None).unsupported_chip(chip) is None
        )

    chosen = {op: [first(op, name) for name in chips] for op in registry.IMPLEMENTATIONS}
    assert chosen["attention"] == ["mosaic_sm100", "mosaic_sm90", "xla_blocks"]
    assert chosen["attention_backward"] == ["mosaic_sm100", "xla_blocks", "xla_blocks"]
    assert chosen["tree_attention"] == ["mosaic_sm100", "mosaic_sm90", "triton"]
