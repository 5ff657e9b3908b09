import pytest

from popsd_integrations.finite_steps import FiniteSteps

INF, NAN = float("inf"), float("nan")


def test_steps_without_a_finite_gradient_are_refused_and_named(caplog):
    steps, looks = FiniteSteps(patience=3), []

    def look():
        looks.append(1)
        return ["prompts[4]", "prompts[7]"]

    assert [steps.refuses(norm, 5, look) for norm in (1.0, NAN, INF, 0.0, NAN, INF)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert len(looks) == 4
    assert "Step refused, weights unchanged: the gradient's norm is nan at step 5." in caplog.text
    assert "not finite: prompts[4]; prompts[7]" in caplog.text
    with pytest.raises(
        FloatingPointError, match=r"loss: expected .*; got 3 steps in a row.*at step 8.*prompts\[7\].*Remove"
    ):
        steps.refuses(NAN, 8, look)


def test_rows_that_are_all_finite_are_said_to_be(caplog):
    FiniteSteps().refuses(INF, 1, list)
    assert "none by itself" in caplog.text
