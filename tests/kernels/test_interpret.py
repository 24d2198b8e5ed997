from pallas_kernels.proof.interpret import run_case


def test_run_case_returns_the_figures_of_a_right_kernel():
    outcome = run_case("interpreter_cases:hand_over", arrives=True, waits=True)
    assert outcome.error is None, outcome.log
    assert outcome.figures == {"right": True}
    assert not outcome.races
    assert not outcome.detected


def test_run_case_sees_a_race():
    outcome = run_case("interpreter_cases:hand_over", arrives=False, waits=False)
    assert outcome.races
    assert outcome.detected


def test_run_case_ends_a_deadlock():
    outcome = run_case("interpreter_cases:hand_over", arrives=False, waits=True, timeout=15.0)
    assert outcome.error is not None
    assert "no result after 15" in outcome.error
    assert outcome.detected


def test_run_case_reports_an_exception():
    outcome = run_case("interpreter_cases:failing")
    assert outcome.error == "ValueError: this case fails"
    assert not outcome.races
