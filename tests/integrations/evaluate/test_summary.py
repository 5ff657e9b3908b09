import pytest

from popsd_integrations.evaluate import report
from popsd_integrations.evaluate.summary import summarise

# (benchmark, problem) -> the answers of four samples by each checkpoint; "r" is right, None is no answer
ANSWERS = {
    "base": {("a", 0): ["r", "r", "x", None], ("a", 1): ["x", "y", "y", "r"], ("b", 0): ["r"] * 4, ("b", 1): ["x"] * 4},
    "run/checkpoint-1": {k: ["r", "r", "r", "x"] for k in (("a", 0), ("a", 1), ("b", 0), ("b", 1))},
    "run/checkpoint-2": {k: ["r", "r", "r", "r"] for k in (("a", 0), ("a", 1), ("b", 0))}
    | {("b", 1): ["x", "x", "r", "r"]},
}
TEXTS = {"base": "Wait, perhaps unlikely.", "run/checkpoint-1": "So.", "run/checkpoint-2": "CHECK, maybe checked"}


def records():
    return [
        {
            "model": label,
            "benchmark": benchmark,
            "problem": problem,
            "sample": sample,
            "question": "?",
            "expected": "r",
            "text": TEXTS[label],
            "tokens": 10 + sample,
            "finish": "length" if answer is None else "stop",
            "correct": answer == "r",
            "answer": answer,
            "formatted": answer is not None,
        }
        for label, problems in ANSWERS.items()
        for (benchmark, problem), answers in problems.items()
        for sample, answer in enumerate(answers)
    ]


@pytest.fixture(scope="module")
def summary():
    runs = {label: label.split("/")[0] for label in ANSWERS}
    return {"about": {}, **summarise(records(), runs)}


def test_accuracies(summary):
    base = summary["models"]["base"]
    assert base["a"]["accuracy"]["mean"] == pytest.approx(3 / 8)
    assert base["b"]["accuracy"]["mean"] == pytest.approx(1 / 2)
    assert base["mean"]["accuracy"]["mean"] == pytest.approx(7 / 16) and base["mean"]["difference"] == {}
    assert base["mean"]["pass_at"] == {
        "1": pytest.approx(7 / 16),
        "2": pytest.approx((5 / 6 + 1 / 2 + 1 + 0) / 4),
        "4": 0.75,
    }
    # r twice against x: right; y twice: wrong; always right; always wrong
    assert base["mean"]["majority"]["mean"] == pytest.approx(1 / 2)
    assert base["a"]["truncated"] == base["a"]["unformatted"] == pytest.approx(1 / 8)
    assert base["mean"]["length"] == {"mean": 11.5, "longest": 13}
    difference = summary["models"]["run/checkpoint-1"]["mean"]["difference"]["accuracy"]
    assert (
        difference["mean"] == pytest.approx(3 / 4 - 7 / 16)
        and difference["low"] < difference["mean"] < difference["high"]
    )


def test_markers(summary):
    markers = summary["models"]["base"]["mean"]["markers"]
    assert markers["paper"]["total"] == 2 * 16 and markers["kim"]["total"] == 3 * 16
    assert markers["whole words"]["total"] == 2 * 16 and markers["kim"]["counts"]["likely"] == 16
    assert markers["paper"]["per_completion"] == 2
    assert markers["paper"]["per_thousand_tokens"] == pytest.approx(2000 / 11.5)
    later = summary["models"]["run/checkpoint-2"]
    assert later["mean"]["markers"]["paper"]["per_completion"] == 3
    assert later["mean"]["markers"]["whole words"]["per_completion"] == 2
    assert later["mean"]["difference"]["markers"] == {"mean": 1.0, "low": None, "high": None}


def test_the_best_checkpoint_of_a_run_is_apart_and_marked(summary):
    found = summary["selected"]["run"]
    assert (found["label"], found["of"]) == ("run/checkpoint-2", 2) and found["gain_by_selection"] > 0
    rows = {row[0]: row for row in report.accuracy_rows(summary)}
    assert rows["run/checkpoint-2"][-1] == report.MARK and rows["run/checkpoint-1"][-1] == rows["base"][-1] == ""
    _, selected = report.selected_rows(summary)
    assert "run/checkpoint-2 (best of 2)" in selected and selected[3].startswith("+43.8 [")
    assert report.table(summary).count("run/checkpoint-2") == 5  # accuracy, selected, three sets of markers


def test_runs_keep_their_colours():
    found = report.colours(["a", "purified", *map(str, range(9))])
    assert found["purified"] == report.COLOURS["purified"] and found["a"] != found["purified"]
    assert list(found.values()).count(found["purified"]) == 1


def test_uneven_records_are_named():
    for spoilt in (records()[:-1], [row for row in records() if (row["model"], row["problem"]) != ("base", 1)], []):
        with pytest.raises(ValueError, match=r"generations: expected the same problems and numbers of samples"):
            summarise(spoilt, {})
