import sys

import pytest

from popsd_integrations import scoring
from popsd_integrations.scoring import Verdict, boxed, check_answer, math_verdict, scorer

# (completion, the problem's answer, whether a teacher would accept it)
ANSWERS = {
    "boxed": [
        (r"\boxed{42}", "42", True),
        (r"The answer is $\boxed{042}$.", "42", True),
        (r"\boxed{41}", "42", False),
        (r"\boxed{7}", "-7", False),
        (r"\boxed{1} no, \boxed{2}", "2", True),
        (r"\boxed{2} no, \boxed{1}", "2", False),
        (r"\boxed{\boxed{5}}", "5", True),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{2^{10}}", "1024", True),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
        (r"\boxed{x=3}", "3", True),
        (r"<think>\boxed{2}</think>\boxed{1}", "2", False),
    ],
    "bare": [
        ("The answer is 42.", "42", True),
        ("the final answer is: 17", "17", True),
        ("So we get $x = 12$.", "12", True),
        ("42", "42", True),
        ("Therefore the answer is 3", "4", False),
        ("I could not solve it.", "4", False),
        ("", "4", False),
        (r"The answer is $\frac{3}{4}$.", "0.75", True),
        ("Final answer: 1000", "1000", True),
        (r"answer: $-\frac12$", "-1/2", True),
    ],
    "fraction": [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{1/2}", r"\frac{1}{2}", True),
        (r"\boxed{\dfrac{4}{6}}", r"\frac23", True),
        (r"\boxed{\frac{2}{3}}", r"\frac{3}{2}", False),
        (r"\boxed{0.333}", r"\frac{1}{3}", False),
        (r"\boxed{-\frac{3}{4}}", r"\frac{-3}{4}", True),
        (r"\boxed{\tfrac{9}{23}}", r"\frac{9}{23}", True),
        (r"\boxed{1\frac{1}{2}}", r"\frac{3}{2}", True),
        (r"\boxed{\frac{\pi}{4}}", r"\pi/4", True),
        (r"\boxed{25\%}", "25", True),
    ],
    "set": [
        (r"\boxed{\{1,2,3\}}", r"\{3,2,1\}", True),
        (r"\boxed{1, 2, 3}", r"\{1,2,3\}", True),
        (r"\boxed{\{1,2\}}", r"\{1,2,3\}", False),
        (r"\boxed{\{1,1,2\}}", r"\{1,2\}", True),
        (r"\boxed{\emptyset}", r"\emptyset", True),
        (r"\boxed{\{\frac12, 2\}}", r"\{0.5, 2\}", True),
        (r"\boxed{x=1 \text{ or } x=2}", r"\{1,2\}", True),
        (r"\boxed{4, 2}", "2, 4", True),
        (r"\boxed{(2,4)}", "(4,2)", False),
    ],
    "interval": [
        (r"\boxed{(1,2]}", "(1,2]", True),
        (r"\boxed{[1,2]}", "(1,2]", False),
        (r"\boxed{(-\infty, 3)}", r"(-\infty,3)", True),
        (r"\boxed{1 < x \le 2}", "(1,2]", True),
        (r"\boxed{x > 3}", r"(3,\infty)", True),
        (r"\boxed{x > 2}", r"(3,\infty)", False),
        (r"\boxed{(-\infty,0)\cup(1,\infty)}", r"(-\infty,0)\cup(1,\infty)", True),
        (r"\boxed{\left[0,\frac12\right)}", "[0,0.5)", True),
        (r"\boxed{(0,1)}", "[0,1]", False),
    ],
    "unit": [
        (r"\boxed{5\text{ cm}}", "5", True),
        (r"\boxed{5}", r"5\text{ cm}", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{\$12.50}", "12.5", True),
        (r"\boxed{3 \text{ hours}}", "3", True),
        (r"\boxed{12\ \mathrm{km/h}}", "12", True),
        (r"\boxed{6\text{ cm}^2}", "6", True),
        (r"\boxed{7\text{ apples}}", "8", False),
        (r"\boxed{1000\text{ m}}", "1000", True),
        (r"\boxed{30^\circ}", "60", False),
    ],
}


@pytest.mark.parametrize("form", ANSWERS)
def test_math_verify_agrees_with_answers_judged_by_hand(form):
    pytest.importorskip("math_verify")
    assert sum(map(len, ANSWERS.values())) == 60
    wrong = [(text, answer) for text, answer, right in ANSWERS[form] if math_verdict(text, answer).correct != right]
    assert not wrong


def test_verdicts_hold_the_answer_and_its_form():
    pytest.importorskip("math_verify")
    assert math_verdict(r"\boxed{0.5}", r"\frac12") == Verdict(True, "1/2", True)
    assert math_verdict("The answer is 4.", "5") == Verdict(False, "4", False)
    assert math_verdict("Who knows?", "5") == Verdict(False, None, False)
    assert math_verdict("x" * 300_000 + r" \boxed{5}", "5").correct  # as long as a chain of thought
    assert math_verdict(rf"\boxed{{{'9' * 5000}}}", "5")[:2] == (False, "9" * 5000)


def test_the_last_whole_box_counts():
    assert boxed(r"\boxed{1} \boxed {\frac{1}{2}} \boxed{never closed") == r"\frac{1}{2}"
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert boxed("no box") is None


@pytest.mark.parametrize("answer", ["", "  ", "???", r"\frac", "$$"])
def test_answers_that_cannot_be_parsed_are_named(answer):
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match=r"answer: expected one that math-verify can parse"):
        check_answer(math_verdict, answer)


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A module with scorers of a user's own."""
    (tmp_path / "own_scorer.py").write_text(
        "def ends(text, answer): return text.endswith(answer)\n"
        "def said(text, answer): return text == answer, text or None\n"
        "def bad(text, answer): return 'yes'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_scorer"
    sys.modules.pop("own_scorer", None)


def test_a_function_of_the_users_is_a_scorer(own):
    ends, said = scorer(f"{own}:ends"), scorer(f"{own}:said")
    assert ends("so 4", "4") == Verdict(True) and ends("so 5", "4") == Verdict(False)
    assert said("4", "4") == Verdict(True, "4", True) and said("", "4") == Verdict(False, None, False)
    check_answer(said, "4")
    with pytest.raises(ValueError, match=r"scorer: expected own_scorer:bad to return True, False or .*'yes'"):
        check_answer(scorer(f"{own}:bad"), "4")


@pytest.mark.parametrize("name", ["own", "no_such_module:f", "math:no_such_function", ":f"])
def test_scorers_that_cannot_be_imported_are_named(name):
    with pytest.raises(ValueError, match=r"scorer: expected 'math' or an importable module:function"):
        scorer(name)


def test_math_verify_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'popsd\[eval\]'") as error:
        scorer()
    assert error.value.name == "math_verify" and scoring.TAIL > 10_000
