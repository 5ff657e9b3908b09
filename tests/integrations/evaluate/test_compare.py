import json
import random

import pytest

from popsd_integrations.cli import main

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


def save_evaluation(folder, models, problems=20, question="What is {}?"):
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
    runs = {label: {"run": label.split("/")[0], "path": "", "weights": None} for label in models}
    (folder / "settings.json").write_text(json.dumps({"settings": {}, "scorer": "x", "checkpoints": runs}))
    return folder


def compare(output, *folders):
    assert main(["compare", *map(str, folders), "--output_dir", str(output)]) == 0
    tables = json.loads((output / "comparison.json").read_text())["tables"]
    return {row[0]: row[1:] for table in tables for row in table}, (output / "compare.html").read_text()


def test_curves_of_loop_and_trainer_stand_beside_one_another(tmp_path):
    loop, trainer = save_loop(tmp_path / "loop"), save_trainer(tmp_path / "trainer")
    rows, page = compare(tmp_path / "out", f"a={loop}", f"b={trainer}")
    assert rows["end of training"] == ["a", "b", "−"]
    value, other, difference = rows["markers per completion"]
    assert (round(float(value), 1), round(float(other), 1)) == (6.0, 2.0)
    assert float(difference.split()[0]) == pytest.approx(-4, abs=0.02) and "[" in difference
    assert rows["student entropy, nats"][2].startswith("-0.1")
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


def spoil(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1}\nbroken\n')


BAD = {
    "no folder": (["{tmp}/none"], "runs: expected a folder"),
    "nothing in it": (["{tmp}/empty", "{tmp}/loop"], "runs: expected metrics.jsonl, a checkpoint with"),
    "one run": (["{tmp}/loop"], "expected at least two trainings"),
    "a broken line": (["{tmp}/broken", "{tmp}/loop"], "expected a JSON object in each line of"),
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
