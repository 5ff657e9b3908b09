"""The tables' numbers: accuracy and what goes with it, and the markers, of every checkpoint on every benchmark."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from popsd.markers import KIM_MARKERS, PAPER_MARKERS, EpistemicMarkers, MarkerCounts
from popsd_integrations.estimates import (
    Interval,
    bootstrap,
    majority,
    paired_difference,
    pass_at_k,
    sampling_error,
    selection_gain,
)
from popsd_integrations.evaluate.checkpoints import BASE

MEAN, DRAWN_SET = "mean", "paper"
MARKER_SETS = {
    "paper": EpistemicMarkers(PAPER_MARKERS, whole_words=False),
    "kim": EpistemicMarkers(KIM_MARKERS, whole_words=False),
    "whole words": EpistemicMarkers(KIM_MARKERS),
}
"""The paper's four and Kim's ten, wherever they stand; the ten as whole words. Not to be compared with one another."""

Problems = list[list[dict[str, Any]]]
"""The records of one checkpoint on one benchmark: a list for each problem, of its samples."""


def group(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Problems]]:
    """Records by checkpoint and benchmark, in the order in which they come.

    Raises ValueError where a problem has other samples than another, or a checkpoint other problems.
    """
    found: dict[str, dict[str, dict[int, list[dict[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        found[record["model"]][record["benchmark"]][record["problem"]].append(record)
    grouped = {
        label: {name: [problems[place] for place in sorted(problems)] for name, problems in benchmarks.items()}
        for label, benchmarks in found.items()
    }
    shapes = {
        label: {name: [[record["problem"] for record in rows] for rows in problems] for name, problems in parts.items()}
        for label, parts in grouped.items()
    }
    counts = {len(rows) for parts in grouped.values() for problems in parts.values() for rows in problems}
    if not shapes or len(counts) != 1 or any(shape != next(iter(shapes.values())) for shape in shapes.values()):
        raise ValueError(
            f"generations: expected the same problems and numbers of samples of every checkpoint; got {len(records)} "
            f"completions with {sorted(counts)} samples of a problem. The command that made them goes on with the rest."
        )
    return grouped


def summarise(records: Sequence[dict[str, Any]], runs: Mapping[str, str]) -> dict[str, Any]:
    """Everything that tables and plots show, as JSON holds it.

    runs: the run of each checkpoint's label. Returns samples, benchmarks (problems of each), models (a dictionary of scores
    for each benchmark and for "mean"), selected (the best checkpoint of each run, see `_selected`), markers.
    """
    grouped = group(records)
    base = grouped.get(BASE)
    names = list(next(iter(grouped.values())))
    models = {}
    for label, parts in grouped.items():
        benchmarks = {name: [name] for name in names} | ({MEAN: names} if len(names) > 1 else {})
        models[label] = {
            shown: _scores([parts[x] for x in of], None if base is None or label == BASE else [base[x] for x in of])
            for shown, of in benchmarks.items()
        }
    return {
        "samples": len(next(iter(grouped.values()))[names[0]][0]),
        "benchmarks": {name: len(problems) for name, problems in next(iter(grouped.values())).items()},
        "models": models,
        "runs": {label: runs.get(label, label) for label in grouped},
        "selected": _selected(grouped, models, runs),
        "markers": {name: dataclasses.asdict(markers) for name, markers in MARKER_SETS.items()},
    }


def overall(models: Mapping[str, Any]) -> dict[str, Any]:
    """The scores over all benchmarks of one checkpoint: its mean, or those of the only one."""
    return dict(models[MEAN] if MEAN in models else next(iter(models.values())))


def rates(problems: Problems) -> list[float]:
    """Share of right answers of each problem."""
    return [sum(record["correct"] for record in rows) / len(rows) for rows in problems]


def marker_rates(problems: Problems) -> list[float]:
    """The paper's markers per completion of each problem."""
    return [_counts(DRAWN_SET, rows).per_completion() for rows in problems]


@cache  # a text is looked at for its benchmark, for the mean, and for differences to it
def _counts_of_text(name: str, text: str) -> MarkerCounts:
    return MARKER_SETS[name].count_text([text])


def _counts(name: str, records: Sequence[dict[str, Any]]) -> MarkerCounts:
    """Counts of one set of markers over completions, and their tokens."""
    found = [_counts_of_text(name, record["text"]).counts for record in records]
    counts = {word: sum(x[word] for x in found) for word in MARKER_SETS[name].words}
    return MarkerCounts(counts, len(records), sum(record["tokens"] for record in records))


def lengths(problems: Problems) -> list[float]:
    """Tokens per completion of each problem."""
    return [sum(record["tokens"] for record in rows) / len(rows) for rows in problems]


def _scores(parts: list[Problems], base: list[Problems] | None) -> dict[str, Any]:
    """Scores over benchmarks, each of which counts alike. base: the same problems by the base model."""
    samples = len(parts[0][0])
    rows = [[record for problem in problems for record in problem] for problems in parts]
    accuracy = bootstrap([rates(x) for x in parts], within=(0, 1))
    scores: dict[str, Any] = {
        "accuracy": accuracy._asdict(),
        "difference": {},
        "pass_at": {
            str(k): _mean([[pass_at_k(samples, sum(r["correct"] for r in x), k) for x in part] for part in parts])
            for k in (1, *(2**power for power in range(1, 12) if 2**power < samples), samples)
            if k <= samples
        },
        "majority": _majority(parts),
        "truncated": _mean([[r["finish"] == "length" for r in part] for part in rows]),
        "unformatted": _unformatted(rows),
        "length": {
            "mean": _mean([lengths(x) for x in parts]),
            "longest": max(r["tokens"] for part in rows for r in part),
        },
        "markers": {name: _markers(name, rows) for name in MARKER_SETS},
        "marker_rate": bootstrap([marker_rates(x) for x in parts])._asdict(),
    }
    if base is not None:
        measures = {"accuracy": rates, "markers": marker_rates, "length": lengths}
        scores["difference"] = {
            name: paired_difference([of(x) for x in parts], [of(x) for x in base])._asdict()
            for name, of in measures.items()
        }
    return scores


def _mean(groups: Sequence[Sequence[float]]) -> float:
    return sum(sum(group) / len(group) for group in groups) / len(groups)


def _majority(parts: list[Problems]) -> dict[str, Any] | None:
    """None where the scorer says no answers."""
    if not any(record.get("answer") is not None for part in parts for rows in part for record in rows):
        return None
    found = [[majority([r["answer"] for r in x], [r["correct"] for r in x]) for x in part] for part in parts]
    return bootstrap(found, within=(0, 1))._asdict()


def _unformatted(rows: list[list[dict[str, Any]]]) -> float | None:
    if any(record.get("formatted") is None for part in rows for record in part):
        return None
    return _mean([[not record["formatted"] for record in part] for part in rows])


def _markers(name: str, rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Totals are sums over all benchmarks, and rates are of these sums."""
    counts = _counts(name, [record for part in rows for record in part])
    return {
        "total": counts.total,
        "per_completion": counts.per_completion(),
        "per_thousand_tokens": counts.per_thousand_tokens(),
        "counts": counts.counts,
    }


def _selected(
    grouped: Mapping[str, dict[str, Problems]], models: Mapping[str, Any], runs: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Of each run the checkpoint with the best accuracy over all benchmarks, and what choosing it gains by itself.

    gain_by_selection: what the best of so many equally good checkpoints has above them in expectation, from the noise of
    the samples on these problems. None where one sample per problem cannot say.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for label in grouped:
        if label != BASE:
            members[runs.get(label, label)].append(label)
    found = {}
    for run, labels in members.items():
        best = max(labels, key=lambda label: overall(models[label])["accuracy"]["mean"])
        parts = list(grouped[best].values())
        error = sampling_error([rates(problems) for problems in parts], len(parts[0][0]))
        gain = None if error is None else error * selection_gain(len(labels))
        found[run] = {"label": best, "of": len(labels), "gain_by_selection": gain}
    return found


def interval(values: Mapping[str, Any] | None) -> Interval | None:
    """An interval as JSON holds it, back."""
    return Interval(**values) if values else None


def step_of(label: str) -> int | None:
    """The step that a label ends with, as in checkpoint-50.

    >>> step_of("runs/purified/checkpoint-50"), step_of("base")
    (50, None)
    """
    found = re.search(r"-(\d+)$", label)
    return int(found[1]) if found else None
