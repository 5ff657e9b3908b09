"""What a run says of itself: the lines of the console, what trackers and metrics.jsonl are given, the model card."""

import contextlib
import io
import json
import re

import pytest
import torch
import yaml

pytest.importorskip("trl")

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl_helpers import ROWS, build, completion_of, logs, tiny

from popsd_integrations.runs.line import EVALUATED, FIGURES, MOST, lines
from popsd_integrations.runs.report import METRICS
from popsd_integrations.trl_trainer.logs import card
from popsd_integrations.trl_trainer.trainer import problem_of

_SUMS = [
    f"{family}{name}" for family in ("", "centred_", "weighted_") for name in ("cos_total_reference", "total_norm")
]
TRACKED = {
    *("loss", "grad_norm", "learning_rate", "epoch", "step_time", "step_refused", "num_tokens"),
    *("divergence", "student_kl", "target_kl", "kl_base", "entropy", "target_entropy", "argmax_agreement"),
    *("token_logprob", "target_logprob", "clip_fraction", "token_clipped", "masks/kept_share"),
    *(f"completions/{least}_{kind}length" for least in ("mean", "min", "max") for kind in ("", "terminated_")),
    *("completions/clipped_ratio", "markers/per_completion", "markers/per_thousand_tokens", "markers/wait"),
    *(f"decomposition/{name}" for name in _SUMS),
}
"""Names in dashboards that people have built. One that goes is a breaking change."""


class Tracker(TrainerCallback):
    """What TensorBoard, W&B and trackio are: callbacks that log all numbers they are given."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append((state.global_step, dict(logs)))


def figures(line):
    """A line is two spaces apart: the progress and its figures."""
    return dict(part.rsplit(" ", 1) for part in line.split("  "))


def named(name):
    model = tiny()
    model.config._name_or_path = name
    return model


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder, tracker = tmp_path_factory.mktemp("logged"), Tracker()
    saved = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    options = {
        "max_steps": 3,
        "masks": {"floor": 0.1, "top_target_entropy": 0.5},
        "eval_rows": ROWS[:4],
        "lora": True,
        **saved,
    }
    trainer, console = build(folder, named("some/model"), **options), io.StringIO()
    trainer.add_callback(tracker)
    with contextlib.redirect_stdout(console):
        trainer.train()
    return folder, options, trainer, tracker, console.getvalue().splitlines()


def test_the_console_has_eight_figures_and_the_trackers_have_all(logged):
    folder, _, trainer, tracker, console = logged
    printed = [figures(line) for line in console]
    assert [row["step"] for row in printed] == ["1/3", "2/3", "2/3", "3/3", "3/3", "3/3"]
    assert all(len(row) <= MOST == 8 for row in printed)
    assert list(printed[0]) == ["step", "loss", "kl_base", "kept", "length", "markers", "grad_norm", "s/step"]
    assert list(printed[2]) == ["step", "eval_loss", "eval_kl_base", "eval_length", "eval_markers"]
    assert "train_runtime" in printed[5]
    (step, first), *_ = tracker.rows
    assert step == 1 and first.keys() >= TRACKED
    for label, number in printed[0].items():
        if label != "step":
            (name,) = (name for name in FIGURES[label] if name in first)
            assert number == f"{first[name]:.4g}"
    assert float(printed[0]["kl_base"]) == pytest.approx(0, abs=1e-6) and float(printed[1]["kl_base"]) > 1e-3
    written = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert written == [row | {"step": step} for step, row in tracker.rows] == trainer.state.log_history


def test_a_resumed_run_writes_each_line_once(logged):
    """From the checkpoint at step 2, with lines of step 3 and a torn one in the file."""
    folder, options, unbroken, *_ = logged
    before = (folder / METRICS).read_text().splitlines()
    (folder / METRICS).write_text("\n".join(before) + '\n{"loss": 0.1, "st')
    resumed = build(folder, named("some/model"), **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    now = (folder / METRICS).read_text().splitlines()
    then, after = ([json.loads(line) for line in some] for some in (before, now))
    assert after[:3] == then[:3], "two steps and the evaluation behind the second"
    whole, again = ([(row["step"], "eval_loss" in row) for row in rows] for rows in (then, after))
    assert again == whole
    assert logs(resumed)[-1]["loss"] == logs(unbroken)[-1]["loss"]


def test_callbacks_of_the_user_stay(tmp_path, capsys):
    class Own(PrinterCallback):
        def on_log(self, args, state, control, **kwargs):
            print("own")

    trainer = build(tmp_path, disable_tqdm=False)
    kinds = [type(one).__mro__[1] for one in trainer.callback_handler.callbacks]
    assert ProgressCallback in kinds, "a bar that transformers' own name removes"
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Own)
    trainer.train()
    assert capsys.readouterr().out.split() == ["own", "own"]


def test_a_bar_has_the_lines_above_it(tmp_path, capsys):
    build(tmp_path, disable_tqdm=False, loss_target="opsd").train()
    (line, summary) = [x.strip() for x in capsys.readouterr().out.splitlines() if "step " in x]
    assert list(figures(line)) == ["step", "loss", "length", "markers", "grad_norm", "s/step", "lr"]
    assert "train_loss" in summary


def test_lines_of_rows_of_any_kind():
    evaluated = {f"eval_math_{name}": 0.5 for name in (*EVALUATED, "runtime", "entropy", "completions/mean_length")}
    (line,) = lines(evaluated, 3, 9)
    names = ("loss", "accuracy", "accuracy_greedy", "truncated", "kl_base", "length")
    assert list(figures(line)) == ["step", *(f"eval_math_{name}" for name in names)]
    own = {f"own/{i}": i for i in range(20)} | {"text": "x", "nothing": None, "total_flos": 1e9}
    assert list(figures(*lines(own, 3, 9))) == ["step", *(f"own/{i}" for i in range(7))]
    assert lines({"epoch": 1.0, "step": 3}, 3, 9) == []
    both = lines({"loss": 0.1, "step": 3, "kept_share": 0.5, "eval/accuracy": 0.25, "eval/mine": 2}, 3, 9)
    assert both == ["step 3/9  loss 0.1  kept 0.5", "step 3/9  eval/accuracy 0.25  eval/mine 2"]


def test_the_model_card_says_what_was_trained_how_and_after_which_papers(logged):
    """Written at the last checkpoint, without a network."""
    text = (logged[0] / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "some/model" and {"trl", "popsd", "purified-opsd"} <= set(front["tags"])
    assert (
        "[Purified OPSD: On-Policy Self-Distillation Without Losing How to Think](https://huggingface.co/papers/2607"
        in text
    )
    assert "| trained | LORA, r = 4, alpha = 8, on " in text and "| steps | 3 of 3, 4 completions each |" in text
    options = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert (
        options["masks"] == {"floor": 0.1, "top_target_entropy": 0.5}
        and options["learning_rate"] == 1e-2
        and options["beta"] == 0.3
    )
    entries = re.findall(r"^@\w+{([^,]+),", text, re.MULTILINE)
    assert entries == ["shen2026purified", "zhao2026opsd", "agarwal2024on-policy", "vonwerra2020trl"]
    bibtex = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    assert len(bibtex) == 2 and all(entry.count("{") == entry.count("}") for entry in bibtex)
    assert text.index("### How it was trained") < text.index("### Framework versions") < text.index("## Citations")


def test_the_card_of_a_baseline_cites_the_baseline(tmp_path):
    trainer = build(tmp_path / "run", named(str(tmp_path)), loss_target="opsd")
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "trained with OPSD, a method" in text and "2607.02234" not in text
    assert f"fine-tuned version of `{tmp_path}`." in text and "None" not in text
    assert "| trained | all weights (" in text
    assert all(
        card.method(name)[1]["citation"] for name in ("purified", "opsd", "beta_opsd", "alpha_mix", "own:target")
    )
    name, paper = card.method("beta_opsd")
    assert paper["id"] == "2607.28582" and "Xu" in paper["citation"] and name == "β-OPSD"


def test_kl_base_is_that_of_the_models_own_logits(tmp_path):
    """Student and base are two models, and first tokens do not count."""
    other = tiny(seed=5)
    trainer = build(tmp_path, teacher=other, eval_rows=ROWS, skip_first_tokens=1, loss_temperature=0.7)
    found, values = trainer.evaluate()["eval_kl_base"], []
    for row in ROWS:
        question = trainer._prompts(problem_of(row)).question
        completion = completion_of(question)
        ids = torch.tensor([question + completion])
        with torch.no_grad():
            log_p, log_base = (
                (model.eval()(ids).logits[0, len(question) : -1].double() / 0.7).log_softmax(-1)
                for model in (tiny(), other)
            )
        values.append((log_p.exp() * (log_p - log_base)).sum(-1))
    assert found == pytest.approx(torch.cat(values).mean().item(), rel=1e-4) and found > 0.1
