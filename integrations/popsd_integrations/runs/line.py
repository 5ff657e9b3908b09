"""The lines of a run's console: at most eight figures of what was logged. All of it is in metrics.jsonl and the trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST = 8
FIGURES = {
    "loss": ("loss",),
    "kl_base": ("kl_base",),
    "kept": ("masks/kept_share", "kept_share"),
    "length": ("completions/mean_length",),
    "markers": ("markers/per_completion",),
    "grad_norm": ("grad_norm",),
    "s/step": ("step_time",),
    "lr": ("learning_rate",),
}
"""What a step's line shows beside the progress, and the names under which the trainer and the plain loop log it.

The rate is last, where a run with masks has no room for it: it follows from the options.
"""
EVALUATED = {
    **{name: (name,) for name in ("loss", "accuracy", "accuracy_greedy", "truncated")},
    **{name: FIGURES[name] for name in ("kl_base", "length", "markers")},
}
_EVALUATION, _SUMMARY = "eval", ("total_flos", "epoch", "step")


def lines(row: Mapping[str, Any], step: int, steps: int) -> list[str]:
    """What the console shows of a logged row: a line for the step, one for an evaluation, or what the row has of the two.

    A part without a loss, such as the summary of a run, is shown as it comes, and cut.

    >>> lines({"loss": 0.04, "divergence": 0.04, "grad_norm": 0.2, "learning_rate": 5e-6, "epoch": 0.1}, 20, 100)
    ['step 20/100  loss 0.04  grad_norm 0.2  lr 5e-06']
    >>> lines({"eval_loss": 0.05, "eval_entropy": 1.2, "eval_accuracy": 0.5, "eval_runtime": 3.0}, 20, 100)
    ['step 20/100  eval_loss 0.05  eval_accuracy 0.5']
    """
    found = []
    prefix = next(
        (name.removesuffix("runtime") for name in row if _is_evaluation(name) and "_runtime" in name), "eval/"
    )
    evaluated = {name.removeprefix(prefix): value for name, value in row.items() if _is_evaluation(name)}
    trained = {name: value for name, value in row.items() if not _is_evaluation(name) and name not in _SUMMARY}
    for before, part, wanted in (("", trained, FIGURES), (prefix, evaluated, EVALUATED)):
        if figures := _chosen(part, wanted):
            shown = [f"{before}{name} {value:.4g}" for name, value in figures]
            found.append("  ".join([f"step {step}/{steps}", *shown[: MOST - 1]]))
    return found


def _is_evaluation(name: str) -> bool:
    return name.startswith(_EVALUATION)


def _chosen(part: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> list[tuple[str, float]]:
    numbers = {name: x for name, x in part.items() if isinstance(x, int | float)}
    if "loss" not in numbers:
        return list(numbers.items())
    return [(label, numbers[name]) for label, names in wanted.items() for name in names if name in numbers]
