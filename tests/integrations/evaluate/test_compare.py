import json
import os
import random

import pytest

from popsd_integrations.cli import main
from popsd_integrations.estimates import Interval
from popsd_integrations.evaluate.compare import _plain, read_run

LOOP = {"loss": 0.1, "student_entropy": 0.5, "markers/per_completion": 6.0, "completions/mean_length": 20.0}
TRAINER = {"loss": 0.2, "entropy": 0.4, "markers/per_completion": 2.0, "completions/mean_length": 10.0}


def history(values, steps, seed, **more):
    rng = random.Random(seed)
    return [
        {"step": step, **{name: value + rng.gauss(0, 0.01) for name, value in values.items()}, **more} for step in steps
    ]


def save_loop(folder, **more):
    """A run of the plain loop, killed while it wrote its last line."""
    folder.mkdir()
    rows = history(LOOP, range(1, 51), 0, **more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "lo')
    return folder


def save_trainer(folder):
    """A run of the trainer, which leaves its history in its checkpoints."""
    for last in (20, 50):
        (folder / f"checkpoint-{last}").mkdir(parents=True)
        rows = history(TRAINER, range(1, last + 1), 1)
        rows += [{"step": 25, "eval_accuracy": 0.3}, {"step": 50, "eval_accuracy": 0.35}]
        (folder / f"checkpoint-{last}" / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    return folder


def save_evaluation(folder, models, problems=20, question="What is {}?", weights=None, **settings):
    """models: label -> chance of a right answer."""
    folder.mkdir(parents=True)
    rows = []
    for label, chance in models.items():
        rng = random.Random(label)
        for problem in range(problems):
            for sample in range(4):
                right = rng.random() < chance
                rows.append(
                    {
                        "model": label,
                        "benchmark": "a",
                        "problem": problem,
                        "sample": sample,
                        "question": question.format(problem),
                        "expected": "1",
                        "text": f"<b>{label}</b> wait: " + ("right" if right else "wrong") * 3,
                        "tokens": 10 + rng.randrange(5),
                        "finish": "stop",
                        "correct": right,
                        "answer": None,
                        "formatted": None,
                    }
                )
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {label: {"run": label.split("/")[0], "path": "", "weights": weights} for label in models}
    (folder / "settings.json").write_text(json.dumps({"settings": settings, "scorer": "x", "checkpoints": runs}))
    return folder


def compare(output, *folders):
    assert main(["compare", *map(str, folders), "--output_dir", str(output)]) == 0
    tables = json.loads((output / "comparison.json").read_text())["tables"]
    return {row[0]: row[1:] for table in tables for row in table}, (output / "compare.html").read_text()


def test_curves_of_loop_and_trainer_stand_beside_one_another(tmp_path):
    loop, trainer = save_loop(tmp_path / "loop"), save_trainer(tmp_path / "trainer")
    rows, page = compare(tmp_path / "out", f"a={loop}", f"b={trainer}")
    assert rows["training, last 20% of the steps"] == ["a", "b", "difference to a"]
    value, other, difference = rows["markers per completion"]
    assert (round(float(value), 1), round(float(other), 1)) == (6.0, 2.0)
    assert float(difference.split()[0]) == pytest.approx(-4, abs=0.02) and "[" in difference
    assert float(rows["student entropy, nats"][2].split()[0]) == pytest.approx(-0.1, abs=0.005)
    assert rows["accuracy, held-out"] == ["–", "0.35", "–"]
    assert page.count("data:image/png") == 1 and (tmp_path / "out" / "curves.png").stat().st_size > 5000


def test_evaluations_are_compared_problem_by_problem(tmp_path):
    one = save_evaluation(
        tmp_path / "a" / "evaluate", {"base": 0.5, "opsd/checkpoint-1": 0.5, "opsd/checkpoint-2": 0.1}
    )
    two = save_evaluation(tmp_path / "b", {"base": 0.5, "purified": 0.6})
    rows, page = compare(tmp_path / "out", f"a={one.parent}", f"b={two}")
    assert list(rows) == [
        "evaluation",
        "base",
        "a: opsd/checkpoint-2",
        "b: purified",
    ]  # the last checkpoint, the base once
    assert rows["base"][1] == "" and "[-" in rows["a: opsd/checkpoint-2"][1]
    assert "<b>" not in page and "&lt;b&gt;purified&lt;/b&gt;" in page and page.count("<details>") == 12
    first = page[page.index("<details>") : page.index("</details>")]
    assert "right, " in first and "wrong, " in first  # those on which they differ come first


def test_an_evaluation_of_several_runs_is_enough(tmp_path):
    one = save_evaluation(tmp_path / "a", {"base": 0.5, "opsd": 0.2, "purified": 0.6})
    rows, _ = compare(tmp_path / "out", one)
    assert list(rows)[1:] == ["base", "opsd", "purified"]


def test_other_problems_have_no_difference(tmp_path):
    one = save_evaluation(tmp_path / "a", {"x": 0.5})
    two = save_evaluation(tmp_path / "b", {"y": 0.5}, question="Who is {}?")
    rows, page = compare(tmp_path / "out", f"a={one}", f"b={two}")
    assert rows["b: y"][1::2] == ["other problems"] * 3 and "<details>" not in page


OTHER = {
    "temperature": ({"temperature": 0.6}, {"temperature": 1.0}, "other temperature"),
    "base": ({"weights": "1", "model": "m"}, {"weights": "2", "model": "m"}, "other base"),
    "place": ({"weights": "1", "model": "m"}, {"weights": "1", "model": "n"}, ""),
    "seed": ({"seed": 0}, {"seed": 1}, ""),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_bases_and_settings_are_not_paired(case, tmp_path):
    first, second, reason = OTHER[case]
    one = save_evaluation(tmp_path / "a", {"base": 0.5, "x": 0.3}, **first)
    two = save_evaluation(tmp_path / "b", {"base": 0.5, "y": 0.4}, **second)
    rows, page = compare(tmp_path / "out", f"a={one}", f"b={two}")
    assert rows["evaluation"][1::2] == ["difference to base"] * 3
    assert "[" in rows["a: x"][1] and ("b: base" in rows) == bool(reason)
    shown = page[page.index("<details>") :]
    assert ("&lt;b&gt;y&lt;/b&gt;" in shown) == (not reason)
    if reason:
        assert rows["b: y"][1::2] == rows["b: base"][1::2] == [reason] * 3
    else:
        assert "[" in rows["b: y"][1]


def test_the_last_checkpoint_is_that_of_the_largest_step(tmp_path):
    """Not the one evaluated or copied last."""
    one = save_evaluation(tmp_path / "a", {"base": 0.5, "r/checkpoint-10": 0.5, "r/checkpoint-2": 0.1})
    trainer = save_trainer(tmp_path / "trainer")
    os.utime(trainer / "checkpoint-20" / "trainer_state.json", (2e9, 2e9))
    found = read_run("a", one), read_run("b", trainer)
    assert list(found[0].evaluated) == ["base", "r/checkpoint-10"]
    assert max(found[1].curves["loss per token, nats"]) == 50


def test_small_differences_have_digits():
    assert _plain(Interval(-2e-5, -3.14159e-5, 0.0), sign=True) == "-2e-05 [-3.14e-05, +0.00]"
    assert (
        _plain(Interval(-0.0, None, None), sign=True) == "+0.00"
        and _plain(Interval(1234.5678, None, None)) == "1234.57"
    )


def spoil(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1}\nbroken\n')


BAD = {
    "no folder": (["{tmp}/none"], "runs: expected a folder"),
    "nothing in it": (["{tmp}/empty", "{tmp}/loop"], "runs: expected metrics.jsonl, a checkpoint with"),
    "one run": (["{tmp}/loop"], "expected at least two trainings"),
    "a broken line": (["{tmp}/broken", "{tmp}/loop"], "expected a JSON object in each line of"),
    "a label twice": (["a={tmp}/loop", "a={tmp}/loop"], "runs: expected each label once; got 'a' again"),
    "two evaluations": (["{tmp}/two", "{tmp}/loop"], "expected one evaluation in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    save_loop(tmp_path / "loop")
    spoil(save_loop(tmp_path / "broken"))
    for name in ("one", "other"):
        save_evaluation(tmp_path / "two" / name, {"x": 0.5}, problems=1)
    names, message = BAD[case]
    names = [name.replace("{tmp}", str(tmp_path)) for name in names]
    assert main(["compare", *names, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
