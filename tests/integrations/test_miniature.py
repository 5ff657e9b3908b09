import contextlib
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from popsd import PurifiedConfig, oracle
from popsd_integrations.cli import main
from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.huggingface.sampling import hf_generate
from popsd_integrations.miniature import evaluate as judging
from popsd_integrations.miniature import experiment, report, task, warmup
from popsd_integrations.miniature.evaluate import evaluate, style_gap
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.task import Puzzle, draw_puzzles, prompt_ids, write_completion
from popsd_integrations.miniature.tokenizer import TOKEN_ID, VOCABULARY, build_tokenizer

pytest.importorskip("transformers")

TINY = warmup.WarmupConfig(hidden_size=16, layers=1, heads=2, mlp_size=16, batch_size=8, cycle_steps=2, max_steps=4)
SOLVED = Puzzle((3, 8, 1, 6), 4, (8, 6))


def ids(text):
    return [TOKEN_ID[token] for token in text.split()]


def tiny(seed=0):
    torch.manual_seed(seed)
    return warmup.build_model(TINY).eval()


def test_tokenizer():
    tokenizer = build_tokenizer()
    assert len(VOCABULARY) == len(tokenizer) == 22
    text = "Q 3 8 1 6 SEP 4 A MAYBE 3 8 CHECK 1 WAIT ANS"
    assert tokenizer(text)["input_ids"] == ids(text)
    assert tokenizer.decode(ids("MAYBE 3 WAIT EOS"), skip_special_tokens=True) == "MAYBE 3 WAIT"


def test_puzzles_have_one_solution_and_a_split_of_their_own():
    found = {}
    for split in ("train", "validation", "test"):
        puzzles = draw_puzzles(200, split, seed=1)
        assert puzzles == draw_puzzles(200, split, seed=1) != draw_puzzles(200, split, seed=2)
        for puzzle in puzzles:
            assert len(set(puzzle.digits)) == 4 and puzzle.split == split
            pairs = [pair for pair in itertools.combinations(puzzle.digits, 2) if sum(pair) % 10 == puzzle.target]
            assert pairs == [puzzle.pair]
            assert replace(puzzle, digits=puzzle.digits[::-1]).split == split
        found[split] = {(tuple(sorted(puzzle.digits)), puzzle.target) for puzzle in puzzles}
    assert not found["train"] & found["test"] and not found["train"] & found["validation"]


def test_prompts_are_those_of_the_context_builder():
    prompts = prompt_ids(SOLVED)
    assert prompts == ContextBuilder(build_tokenizer(), task.MINIATURE_CONTEXTS).build(SOLVED.problem)
    assert prompts.question == ids("Q 3 8 1 6 SEP 4 A")
    assert prompts.teacher == ids("Q 3 8 1 6 SEP 4 R 8 6 OK A")
    assert prompts.reference == ids("R 8 6 OK A")


@pytest.mark.parametrize("context", ["question", "teacher", "reference"])
def test_completions_have_the_style_of_their_context(context):
    rng, tries, peeks, count = random.Random(0), Counter(), 0, 2000
    for puzzle in draw_puzzles(count, "train", seed=0):
        tokens = [VOCABULARY[token] for token in write_completion(puzzle, context, rng)]
        assert len(tokens) <= task.MAX_NEW_TOKENS
        peeks += {int(tokens[1]), int(tokens[2])} == set(puzzle.pair)
        place = 0
        while tokens[place] != "ANS":
            kind, a, b = tokens[place], *map(int, tokens[place + 1 : place + 3])
            tries[kind] += 1
            verdict = tokens[place + (3 if kind == "SO" else 5)]
            if kind == "MAYBE":
                assert tokens[place + 3 : place + 5] == ["CHECK", str((a + b) % 10)]
                assert (verdict == "OK") == ({a, b} == set(puzzle.pair))
            assert (verdict == "OK") == (tokens[place + (4 if kind == "SO" else 6)] == "ANS")
            assert context == "reference" or {a, b} <= set(puzzle.digits)
            place += 4 if kind == "SO" else 6
        assert tokens[place + 1 :] == [str(a), str(b), "EOS"]
    style = task.STYLES[context]
    assert tries["SO"] / tries.total() == pytest.approx(style.terse, abs=0.03)
    chance = 1 / (45 if context == "reference" else 6)
    assert peeks / count == pytest.approx(style.peek + (1 - style.peek) * chance, abs=0.03)


@pytest.mark.parametrize(
    ("completion", "solved"),
    [
        ("SO 8 6 OK ANS 8 6 EOS", True),
        ("ANS 6 8 EOS", True),
        ("ANS 8 3 EOS", False),
        ("MAYBE 8 6 CHECK 4 OK ANS 8 6", False),
        ("6 EOS", False),
        ("8 8 6 EOS", False),
    ],
)
def test_what_counts_as_solved(completion, solved):
    assert SOLVED.solved_by(ids(completion)) == solved


def test_warmup_loss_is_over_completion_tokens_alone():
    model = tiny()
    batch = next(task.warmup_batches(8, seed=0))
    assert {context: len(rows[0]) for context, rows in batch.items()} == {"question": 4, "teacher": 2, "reference": 2}
    losses = []
    for prompts, completions in batch.values():
        for prompt, completion in zip(prompts, completions, strict=True):
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    torch.testing.assert_close(warmup._loss(model, batch), torch.cat(losses).mean(), rtol=1e-5, atol=1e-6)


def test_warmup_runs_cycles_until_accurate_and_is_cached(tmp_path, monkeypatch):
    reached = iter([0.1, 0.5])
    monkeypatch.setattr(warmup, "accuracy", lambda puzzles, completions: next(reached))
    steps = []
    model = warmup.warm_up(TINY, tmp_path, lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3, 4]
    cached = warmup.warm_up(TINY, tmp_path, lambda step, loss: pytest.fail("trained again"))
    for one, other in zip(model.parameters(), cached.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(model.lm_head.weight, tiny().lm_head.weight)
    assert replace(TINY, seed=1).fingerprint != TINY.fingerprint
    monkeypatch.setitem(task.STYLES, "question", task.Style(0.5, 0.2, 0.0))
    assert list(tmp_path.iterdir()) != [tmp_path / f"warmup-{TINY.fingerprint}.pt"]


def test_a_warmup_that_does_not_learn_is_an_error_and_leaves_no_cache(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"max_steps: expected a validation accuracy of 0.4 within 4 steps.*another seed"
    ):
        warmup.warm_up(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_named(tmp_path):
    path = tmp_path / f"warmup-{TINY.fingerprint}.pt"
    path.write_text("damage")
    with pytest.raises(ValueError, match=r"cache_dir: .*a file that does not load.*Delete it"):
        warmup.warm_up(TINY, tmp_path)


def test_learning_rate_cycle():
    config = warmup.WarmupConfig()
    rates = [warmup._rate(step, config) for step in range(config.cycle_steps)]
    assert rates[0] == 1 / 50 and max(rates) == rates[49] == 1.0
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("options", [{"cycle_steps": 0}, {"accuracy": 1.0}])
def test_bad_warmup_options_are_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        warmup.WarmupConfig(**options)


def test_dropping_finished_rows_changes_no_completion():
    model = tiny(3)
    prompts = [prompt_ids(puzzle).question for puzzle in draw_puzzles(40, "test", 0)]
    # Of this random model's likely tokens many are ends, so that rows leave at different times.
    options = {"max_new_tokens": 12, "eos_token_id": [TOKEN_ID["EOS"], *range(0, 10, 2)], "pad_token_id": 10}
    completions = sample(model, prompts, temperature=0.0, **options)
    assert completions == hf_generate(model, prompts, temperature=0.0, **options)
    torch.manual_seed(0)
    drawn = sample(model, prompts, temperature=1.0, **options)
    assert len({len(completion) for completion in drawn}) > 3
    with pytest.raises(ValueError, match=r"prompts: expected equal lengths"):
        sample(model, [[1], [1, 2]], temperature=0.0, **options)


def test_evaluation_scores_and_leaves_no_trace():
    model, puzzles = tiny().train(), draw_puzzles(30, "test", 0)
    state = torch.get_rng_state()
    score = evaluate(model, puzzles, seed=1)
    assert score == evaluate(model, puzzles, seed=1) != evaluate(model, puzzles, seed=2)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert 0 < score.length <= 46 and 0 <= score.eos_rate <= 1 and score.markers > 0


def test_style_gap_is_of_the_models_own_distributions():
    model, puzzles = tiny(), draw_puzzles(5, "test", 0)
    gap = style_gap(model, puzzles)
    logits = {}
    for name, context in (("base", "question"), ("teacher", "teacher"), ("reference", "reference")):
        rows = [getattr(prompt_ids(puzzle), context) for puzzle in puzzles]
        logits[name] = model(input_ids=torch.tensor(rows)).logits[:, -1]
    target = oracle.purified_target_logits(*logits.values(), config=PurifiedConfig())
    for name, values in {**logits, "target": target}.items():
        assert gap[name] == pytest.approx(values.softmax(-1)[:, TOKEN_ID["MAYBE"]].mean().item(), rel=1e-4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A whole experiment, only as small as can be, in a process of its own as in the demo."""
    folder = tmp_path_factory.mktemp("demo")
    config = experiment.ExperimentConfig(max_steps=3, batch_size=4, evaluate_every=2, test_puzzles=20, warmup=TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "accuracy", lambda puzzles, completions: 1.0)
        found = experiment.run_experiment(config, folder, folder / "cache", processes=1, progress=False)
    return folder, config, found


def test_results_of_an_experiment(results):
    folder, _, found = results
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(found))
    for row in ("base", "opsd", "purified"):
        assert found[row].keys() == {"accuracy", "accuracy_greedy", "markers", "length", "eos_rate"}
    for target in ("opsd", "purified"):
        (steps,) = found["steps"][target]
        assert [row["step"] for row in steps] == [1, 2, 3]
        assert [row["step"] for row in steps if "eval/accuracy" in row] == [2, 3]
        assert found["per_seed"][target] == [found[target]]
    assert found["steps"]["opsd"][0][0]["student_entropy"] == pytest.approx(
        found["steps"]["purified"][0][0]["student_entropy"]
    )
    assert found["steps"]["opsd"][0][0]["loss"] != found["steps"]["purified"][0][0]["loss"]


def test_a_finished_run_is_read_back_and_not_run_again(results, monkeypatch):
    folder, config, found = results
    monkeypatch.setattr(experiment, "sample", lambda *arguments, **options: pytest.fail("ran again"))
    assert experiment.distil(config, "opsd", 0, folder / "opsd-seed0", folder / "cache") == found["steps"]["opsd"][0]


def test_table_says_what_was_chosen_and_what_is_not_claimed(results):
    text = " ".join(report.table(results[2]).split())
    assert "standard OPSD" in text and "accuracy, greedy" in text
    assert "a design choice in the synthetic data" in text and "No gain over the base is claimed" in text


def test_one_problem_is_solved_by_the_three_models(results, monkeypatch):
    """The completions are those of the models that the runs saved, and the puzzle is the first that sets them apart."""
    shown = results[2]["example"]
    assert list(shown["completions"]) == ["base", "opsd", "purified"] and not shown["wanted"]  # nothing is trained here
    puzzle = draw_puzzles(20, "test", 0)[0]
    assert shown["answer"] == "{} and {}".format(*puzzle.pair) and str(puzzle.target) in shown["question"]

    chosen = {"base": {1, 2, 3}, "opsd": {0, 1}, "purified": {2, 3}}
    puzzles = draw_puzzles(5, "test", 0)
    answers = {
        name: [
            [TOKEN_ID["ANS"], *(x.pair if i in right else (x.pair[0],) * 2), TOKEN_ID["EOS"]]
            for i, x in enumerate(puzzles)
        ]
        for name, right in chosen.items()
    }
    monkeypatch.setattr(judging, "complete", lambda model, puzzles, temperature: answers[model])
    monkeypatch.setattr(judging, "eval_mode", lambda model: contextlib.nullcontext())
    found = judging.example({name: name for name in answers}, puzzles)
    assert found["wanted"] and found["answer"] == "{} and {}".format(*puzzles[2].pair)
    assert [x["correct"] for x in found["completions"].values()] == [True, False, True]
    page = report.beside(found)
    assert (
        page.count("<section") == 3 and "Chosen: the first test puzzle" in page and page.count("Right, 4 tokens") == 2
    )
    assert report._tries("MAYBE 3 8 CHECK 1 WAIT SO 6 8 OK ANS 6 8").splitlines()[1:] == ["SO 6 8 OK", "ANS 6 8"]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("plotted", [True, False])
def test_report_is_one_well_formed_page_without_network(results, tmp_path, plotted):
    if plotted:
        pytest.importorskip("matplotlib")
    plots = report.plot(results[2], tmp_path) if plotted else []
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)
    report.write_html(results[2], plots, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(content)
    assert page.open == []
    assert len(page.links) == len(plots) and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in content
    text = " ".join(" ".join(page.text).split())
    assert "a design choice in the synthetic data" in text and f"{results[2]['opsd']['accuracy']:.3f}" in text
    assert ("matplotlib is not installed" in text) != plotted


@pytest.mark.parametrize("name", ["num_seeds", "max_steps", "batch_size", "test_puzzles"])
def test_bad_experiment_options_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1; got 0"):
        experiment.ExperimentConfig(**{name: 0})


@pytest.mark.slow
def test_opsd_collapses_and_purified_does_not(tmp_path):
    assert main(["demo", "--output-dir", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["opsd"]["accuracy"] < found["base"]["accuracy"] - 0.08
    assert found["purified"]["accuracy"] > found["opsd"]["accuracy"] + 0.08
