import pytest

from pallas_kernels.proof.interpret import run_case


@pytest.mark.parametrize(
    ("case", "chip", "arguments"),
    [
        ("hand_over", "sm_100", {"arrives": True, "waits": True}),
        ("product", "sm_90", {"waits": True, "overwrites": False}),
    ],
)
def test_run_case_returns_the_figures_of_a_right_kernel(case, chip, arguments):
    outcome = run_case(f"interpreter_cases:{case}", chip=chip, **arguments)
    assert outcome.error is None, outcome.log
    assert outcome.figures == {"right": True}
    assert outcome.detection is None


def test_run_case_sees_a_race():
    outcome = run_case("interpreter_cases:hand_over", arrives=False, waits=False)
    assert outcome.races
    assert outcome.detection == "race"


def test_run_case_sees_a_race_of_a_kernel_that_is_not_the_last():
    outcome = run_case("interpreter_cases:races_then_not")
    assert outcome.figures == {"right": True}
    assert outcome.detection == "race", outcome.log


@pytest.mark.parametrize(
    ("arguments", "detection"),
    [
        ({"waits": True, "overwrites": True}, "race"),
        ({"waits": False, "overwrites": False}, "unfinished"),
    ],
)
def test_run_case_sees_that_products_on_hopper_take_time(arguments, detection):
    outcome = run_case("interpreter_cases:product", chip="sm_90", **arguments)
    assert outcome.detection == detection, outcome.log


def test_run_case_ends_a_deadlock():
    outcome = run_case("interpreter_cases:hand_over", arrives=False, waits=True, timeout=15.0)
    assert outcome.error is not None
    assert "no result after 15" in outcome.error
    assert outcome.detection == "deadlock"


def test_run_case_reports_an_exception():
    outcome = run_case("interpreter_cases:failing")
    assert outcome.error == "ValueError: this case fails"
    assert outcome.detection is None
