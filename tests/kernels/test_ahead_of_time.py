"""Kernels compiled to machine code for B200 and H200: resources and instruction counts.

Every expected count follows from tile sizes. The tests of compilation skip themselves where the
compiling environment is missing; the reason says how to build it.
"""

import functools

import pytest

from pallas_kernels.attention_config import forward_config
from pallas_kernels.proof import ahead_of_time, cycles, sass
from pallas_kernels.proof.targets import B200, H200

WARPGROUP = 128
DEPTH = 16  # of one tensor core instruction on 16-bit numbers
SPILLED_BYTES = 16
EXP = "MUFU.EX2"

PROGRAM = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R2, R2 ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4 ;
        /*0030*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   FFMA2 R2, R2, R3, R4 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   FADD R2, R2, R2 ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4 ;
        /*0090*/              @!P1 BRA `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_2) ;
        /*00b0*/                   NOP ;
"""


def test_parse_counts_instructions_without_padding():
    counts = sass.count(sass.parse(PROGRAM)[0])
    assert counts.total == 11
    assert counts["MUFU"] == counts["MUFU.EX2"] == counts["FADD"] == 1
    assert counts["FF"] == 0


def test_hot_loops_follow_control_flow_and_not_the_order_of_the_text():
    (loop,) = sass.hot_loops(PROGRAM, ("MUFU.EX2",))
    # The wait out of line belongs to the loop; what stands between the two does not.
    assert loop.total == 8
    assert loop["FADD"] == loop["EXIT"] == loop["MOV"] == 0


SWITCH = """
        /*0000*/                   BRX R4 -0x10 ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R2, R2 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   NOP ;
.L_x_3:
        /*0050*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], UPT ;
        /*0060*/                   @P0 BRA `(.L_x_3) ;
        /*0070*/                   EXIT ;
"""


def test_hot_loops_behind_a_jump_through_a_table_are_found():
    softmax, products = sass.hot_loops(SWITCH, ("MUFU.EX2", "UTCHMMA"))
    assert softmax.total == products.total == 2
    assert products.matrix_products == 1


HELPER = """
        .section        .text.__cuda_trap,"ax",@progbits
__cuda_trap:
        /*0000*/                   RET.ABS.NODEC R20 0x0 ;
        .section        .text.kernel,"ax",@progbits
kernel:
"""


def test_helper_functions_before_the_kernel_do_not_count():
    (loop,) = sass.hot_loops(HELPER + PROGRAM, ("MUFU.EX2",))
    assert loop.total == 8


VOTE = """
.L_x_1:
        /*0000*/                   VOTE.ANY P0, !P1 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   LDTM.x32 R36, tmem[UR4] ;
        /*0030*/                   {planted} ;
        /*0040*/                   FENCE.VIEW.ASYNC.T ;
.L_x_2:
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING R3, 0x80 ;
        /*0060*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING R3, 0x80 ;
        /*00a0*/                   BRA `(.L_x_3) ;
"""
# The same where the compiler moved the branch out of line.
VOTE_OUT_OF_LINE = """
.L_x_1:
        /*0000*/                   VOTE.ANY P0, !P1 ;
        /*0010*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING R3, 0x80 ;
        /*0030*/               @P2 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   LDTM.x32 R36, tmem[UR4] ;
        /*0060*/                   {planted} ;
        /*0070*/                   FENCE.VIEW.ASYNC.T ;
        /*0080*/                   BRA `(.L_x_2) ;
"""


@pytest.mark.parametrize("text", [VOTE, VOTE_OUT_OF_LINE])
@pytest.mark.parametrize(
    ("planted", "barriers"), [("BAR.SYNC.DEFER_BLOCKING R3, 0x80", 1), ("DEPBAR.LE SB0, 0x1", 0)]
)
def test_a_barrier_that_some_warps_of_a_vote_skip_is_seen(text, planted, barriers):
    (branch,) = sass.vote_branches(text.format(planted=planted))
    assert branch["LDTM"] == branch["FENCE"] == 1
    assert branch["BAR"] == barriers


BUDGETS = """
        /*0000*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xd0 ;
        /*0010*/                   USETMAXREG.DEALLOC.CTAPOOL 0x60 ;
"""


@pytest.mark.parametrize(("text", "asked"), [(BUDGETS, 2 * 208 + 96), ("", 3 * 168)])
def test_registers_asked_are_those_of_all_warpgroups(text, asked):
    assert sass.registers_asked(text, warpgroups=3, at_launch=168) == asked


def test_a_target_describes_its_device():
    assert 'device_description_str: "NVIDIA B200"' in B200.description()
    assert "major: 9" in H200.description()


def test_forward_step_is_bound_by_products_and_exponentials_alike():
    step = cycles.forward_step(tiles=1, rows=128, keys=128, head_dim=128)
    without_copies = step.clocks(B200)["shared"] - cycles.copy(128, 256).clocks(B200)["shared"]
    assert step.clocks(B200)["mma"] == step.clocks(B200)["exp"] == 1024
    assert without_copies == 768


def test_a_second_query_tile_shares_the_copies_of_keys():
    one, two = (cycles.forward_step(tiles=n, rows=128, keys=128, head_dim=128) for n in (1, 2))
    assert one.bound(B200) == 1280
    assert two.bound(B200) == 2 * 1024


def test_two_sms_together_read_half_of_keys_and_values_each():
    one, two = (
        cycles.forward_step(tiles=1, rows=128, keys=128, head_dim=128, sms=n).clocks(B200)
        for n in (1, 2)
    )
    # Keys and values once as they arrive and once in the products, of 32 KB each.
    assert one["shared"] - two["shared"] == 4 * 32 * 1024 / 2 / B200.shared_bytes_per_clock
    assert two["mma"] == one["mma"]


@pytest.mark.parametrize(("target", "rows"), [(B200, 128), (H200, 64)])
def test_decoding_is_bound_by_memory_even_with_two_tiles(target, rows):
    step = cycles.decode_step(tiles=2, rows=rows, keys=128, head_dim=128, staged=rows == 64)
    gpu_bytes_per_clock = target.memory_bandwidth / target.clock_ghz / 1e9
    assert step.bound(target) == pytest.approx(64 * 1024 * target.num_sms / gpu_bytes_per_clock)


def test_backward_steps_have_seven_products():
    keys = cycles.key_value_gradient_step(tile=128, head_dim=128).clocks(B200)
    query = cycles.query_gradient_step(tile=128, head_dim=128).clocks(B200)
    assert keys["mma"] + query["mma"] == 7 * 512
    assert keys["mma"] == keys["shared"]


def test_the_step_with_a_mask_is_counted_by_itself():
    loops = [sass.Counts({"MUFU.EX2": 128, "FFMA": slots}) for slots in (400, 700)]
    assert [loop["FFMA"] for loop in cycles.exp_loops(loops, 1)] == [400]
    assert [loop["FFMA"] for loop in cycles.exp_loops(loops, 1, masked=True)] == [700]
    assert cycles.exp_loops(loops, 2, masked=True) == []


@functools.cache
def missing(python):
    return ahead_of_time.missing(python)


@pytest.fixture(params=ahead_of_time.interpreters())
def python(request):
    if (reason := missing(request.param)) is not None:
        pytest.skip(reason)
    return request.param


def by_library(kernel):
    return kernel.assembler.startswith("nvJitLink")


def compiled(python, case, target, **options):
    kernels = ahead_of_time.compile_case(case, target, python=python, **options)
    for kernel in kernels:
        # Where nvJitLink assembles, kernels may spill: a GPU gets none with that JAX (`registry`).
        assert kernel.register_budgets_ignored == by_library(kernel)
        if not by_library(kernel):
            assert not kernel.products_serialized
            assert kernel.spill_store_bytes <= SPILLED_BYTES
            assert kernel.spill_load_bytes <= SPILLED_BYTES
        assert kernel.registers_asked <= kernel.registers * kernel.warpgroups
        assert all(branch["BAR"] == 0 for branch in kernel.vote_branches)
        assert kernel.tensor_columns <= target.tensor_columns
        assert kernel.shared_bytes <= target.shared_bytes
    return kernels


def by_name(kernels, part):
    (kernel,) = (one for one in kernels if part in one.name)
    return kernel


@pytest.mark.parametrize(
    ("head_dim", "dtype", "causal"),
    [
        (128, "bfloat16", False),
        (64, "float16", True),
        pytest.param(128, "float16", True, marks=pytest.mark.slow),
        pytest.param(64, "bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_backward_sm100_counts(python, head_dim, dtype, causal):
    options = {"head_dim": head_dim, "dtype": dtype, "causal": causal, "kv_heads": 4}
    kernels = compiled(python, "backward_cases:compiled", B200, **options)
    scores_per_thread = 128 * 128 // (2 * WARPGROUP)
    over_head, over_tile = head_dim // DEPTH, 128 // DEPTH
    for part, products in (
        ("key_value", 2 * over_head + 2 * over_tile),
        ("query", 2 * over_head + over_tile),
    ):
        kernel = by_name(kernels, part)
        softmax = [loop for loop in kernel.hot_loops if loop[EXP]]
        assert softmax
        for loop in softmax:
            assert loop[EXP] == loop["MUFU"] == scores_per_thread
            for packed in ("FFMA2", "FMUL2", "FADD2"):
                # score * scale - LSE, weight * slope, and slope - delta: two numbers each.
                assert loop[packed] == scores_per_thread // 2
        assert sum(loop.matrix_products for loop in kernel.hot_loops) == products
    # Scores and slopes, which take turns at head dim 128, and both in 16 bits, two to a column; the
    # query's kernel keeps the slopes of two steps in 16 bits.
    float32_tiles = 1 if head_dim == 128 else 2
    assert by_name(kernels, "key_value").tensor_columns == 128 * (float32_tiles + 1) + 2 * head_dim
    assert by_name(kernels, "query").tensor_columns == 128 * (2 + 1) + head_dim


@pytest.mark.parametrize(
    ("head_dim", "dtype", "causal"),
    [
        (128, "bfloat16", False),
        pytest.param(64, "float16", True, marks=pytest.mark.slow),
        pytest.param(128, "float16", True, marks=pytest.mark.slow),
        pytest.param(64, "bfloat16", False, marks=pytest.mark.slow),
        pytest.param(128, "float16", False, marks=pytest.mark.slow),
    ],
)
def test_forward_sm90_counts(python, head_dim, dtype, causal):
    options = {"head_dim": head_dim, "dtype": dtype, "causal": causal, "kv_heads": 4}
    (kernel,) = compiled(python, "hopper_cases:compiled", H200, **options)
    scores_per_thread, rows_per_thread = 64 * 128 // WARPGROUP, 2
    loops = [loop for loop in kernel.hot_loops if loop[EXP]]
    assert len(loops) == 2  # without and with a mask
    for loop in loops:
        assert loop[EXP] == scores_per_thread + rows_per_thread
        assert loop["HGMMA"] == head_dim // DEPTH + 128 // DEPTH
        assert loop["CS2R"] == 0  # no zeros are written for products to be added to
        assert by_library(kernel) or loop["STL"] == loop["LDL"] == 0


FORWARD_SM100 = {
    "head dim 128": {},
    "head dim 64": {"head_dim": 64},
    "head dim 192": {"head_dim": 192},
    "head dim 256": {"head_dim": 256},
    "float16": {"dtype": "float16"},
    "float16, head dim 64, causal": {"dtype": "float16", "head_dim": 64, "causal": True},
    "float16, head dim 256, causal": {"dtype": "float16", "head_dim": 256, "causal": True},
    "causal": {"causal": True, "kv_heads": 4},
    "ragged": {"ragged": True, "batch": 4, "tokens": 1000, "slots": 1000},
    "causal, soft cap": {"causal": True, "soft_cap": 50.0},
    "window and soft cap": {"causal": True, "window": 1024, "soft_cap": 50.0},
    "window and soft cap, head dim 256": {
        "causal": True,
        "window": 1024,
        "soft_cap": 50.0,
        "head_dim": 256,
    },
    "window, ragged": {"window": 512, "ragged": True, "batch": 4},
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name == "head dim 128" else pytest.mark.slow)
        for name in FORWARD_SM100
    ],
)
def test_forward_sm100_counts(python, case):
    options = FORWARD_SM100[case]
    head_dim = options.get("head_dim", 128)
    caps = {name: options[name] for name in ("soft_cap", "window") if name in options}
    config = forward_config(head_dim, **caps)
    (kernel,) = compiled(python, "forward_cases:compiled", B200, **options)
    by_polynomial = config.polynomial_chunks * config.chunk
    # Blocks that are seen in part come last, and those that a window begins in first.
    masked = ("window" in options) + any(x in options for x in ("window", "causal", "ragged"))
    loops = config.tiles * (1 + masked)
    # A thread has a row: its scores, less those by polynomial, and the factor of older sums.
    scores = config.block_kv + 1
    assert kernel.counts[EXP] == loops * scores - config.tiles * by_polynomial
    assert kernel.counts["MUFU.TANH"] == ("soft_cap" in options) * loops * config.block_kv
    # The first product of an item comes before its loop.
    over_head, over_block = head_dim // DEPTH, config.block_kv // DEPTH
    assert kernel.counts.matrix_products == config.tiles * (2 * over_head + over_block)
    assert kernel.tensor_columns == config.tmem_columns(head_dim)
    # The factors of a tile's rows are voted on where its accumulator is rescaled.
    assert len(kernel.vote_branches) == config.tiles
    softmax = [loop for loop in kernel.hot_loops if loop[EXP]]
    assert sorted(loop[EXP] for loop in softmax) == sorted(
        config.tiles * ([scores - by_polynomial] + [scores] * masked)
    )
    for loop in softmax:
        polynomials = scores - loop[EXP]
        assert loop["FFMA2"] >= (config.block_kv + 3 * polynomials) // 2
    assert sum(loop.matrix_products for loop in kernel.hot_loops) == config.tiles * (
        over_head + over_block
    )


@pytest.mark.slow
def test_a_meeting_of_the_warpgroup_in_a_vote_is_seen_in_machine_code(python):
    (kernel,) = ahead_of_time.compile_case(
        "forward_cases:compiled_to_meet_in_votes", B200, python=python
    )
    assert all(branch["BAR"] > 0 for branch in kernel.vote_branches)
    assert len(kernel.vote_branches) == 2


@pytest.mark.slow
def test_forward_sm100_issues_within_five_percent_of_the_bound(python):
    (kernel,) = compiled(python, "forward_cases:compiled", B200)
    step = cycles.Step(
        name="forward",
        work=cycles.forward_step(tiles=2, rows=128, keys=128, head_dim=128),
        exp_warpgroups=2,
        bodies=2,
        other_warpgroups=1,
    )
    found = cycles.achieved(kernel, step, B200)
    if by_library(kernel):
        pytest.skip("its spills cost issue slots, and a GPU gets none of these kernels")
    assert found.issue <= 1.05 * found.bound
    assert found.clocks <= 1.05 * found.bound
    assert found.exponentials_per_score < 1
