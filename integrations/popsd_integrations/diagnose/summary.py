"""From a row for each token to what is said of it: means, curves and verdicts, with intervals over completions.

Tokens of one completion are alike, so completions are what is resampled. A mean is over tokens, and an interval is that of
`estimates.ratio`: what the tokens sum to, over how many count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from popsd.modules import FRACTION_CEILING
from popsd_integrations.diagnose.watched import Watched
from popsd_integrations.estimates import Interval, ratio

CONTEXTS = ("base", "teacher", "reference", "target")
CURVES = (
    "reference_fraction",
    "weighted_reference_fraction",
    "cos_total_reference",
    "cos_total_transferable",
    "mass_moved",
)
CANNOT_TELL = "cannot tell"
FORKS = 0.2
"""Share of the tokens, those of highest entropy under the base, that count as forks."""
_MOST_NEEDED = 100_000


@dataclass(frozen=True)
class Diagnosis:
    """tokens: a row for each completion token, in order, with completion, position, text and numbers.

    markers: of each marker and of "all": mean probability per completion token under base, teacher, reference and target;
    ``change`` and ``teacher_change``, what target and teacher have relative to the base; ``verdict``.
    positions: means over bins of positions, with how many tokens and completions there are. means: over all tokens.
    completions: the prompts that each was sampled and measured under, as text. note: what split markers are measured by.
    config: what was asked for. about: what a page says of model, data and command.
    """

    tokens: list[dict[str, Any]]
    markers: dict[str, dict[str, Any]]
    positions: list[dict[str, Any]]
    means: dict[str, Interval]
    completions: list[dict[str, str]]
    config: dict[str, Any]
    note: str = ""
    about: dict[str, str] = field(default_factory=dict)

    @property
    def change(self) -> Interval | None:
        """The markers' probability under the target, relative to the base's. 1 is unchanged."""
        change: Interval | None = self.markers["all"]["change"]
        return change

    @property
    def direction(self) -> str:
        """What training on the target would do to the markers: "raise", "lower", "keep" or "cannot tell"."""
        return str(self.markers["all"]["verdict"])

    @property
    def sentence(self) -> str:
        """The finding in words."""
        total, target, count = self.markers["all"], self.config["loss_target"], len(self.completions)
        verb = {"raise": "raise", "lower": "lower", "keep": "leave as they are"}.get(self.direction)
        said = f"The {target} target would {verb} the epistemic markers"
        if verb is None:
            said = (
                f"Whether the {target} target would raise or lower the epistemic markers cannot be told from {count} "
                f"completion{'s' * (count != 1)}"
            )
        said += (
            f": {total['target']:.4f} per completion token against the base's {total['base']:.4f} "
            f"({times(self.change)})."
        )
        more = needed(self.change, self.config["margin"], count) if verb is None else None
        if more is not None:
            said += f" If the estimate holds, {'about ' * (more < _MOST_NEEDED)}{more:,} completions would tell"
            said += "." if more < _MOST_NEEDED else " or more."
        if self.config["contexts"] != ["teacher"]:
            said += (
                f" The teacher itself, standard OPSD's target, has {total['teacher']:.4f} "
                f"({times(total['teacher_change'])})."
            )
        return said + (
            f" The target moves {self.means['mass_moved'].mean:.1%} of the probability mass, and of the teacher's signal "
            f"‖Δ_ref‖/‖Δ_total‖ = {self.means['reference_fraction'].mean:.2f} is there under the reference prompt too."
        )


def times(change: Interval | None) -> str:
    """A change in words, with its interval where there is one."""
    if change is None:
        return "the base has none"
    if change.low is None:
        return f"{change.mean:.2f} times, no interval"
    return f"{change.mean:.3f} times, 95 % interval {change.low:.3f} to {change.high:.3f}"


def verdict(change: Interval | None, margin: float) -> str:
    """Where the whole interval lies: above 1 + margin, below 1 − margin, or between; otherwise nobody can tell."""
    if change is None or change.low is None or change.high is None:
        return CANNOT_TELL
    if change.low > 1 + margin:
        return "raise"
    if change.high < 1 - margin:
        return "lower"
    return "keep" if 1 - margin <= change.low and change.high <= 1 + margin else CANNOT_TELL


def needed(change: Interval | None, margin: float, count: int) -> int | None:
    """About how many completions would make the interval narrow enough, if the estimate is right; None where it has none."""
    if change is None or change.low is None or change.high is None:
        return None
    distance = min(abs(change.mean - edge) for edge in (1 - margin, 1 + margin))
    half = max(change.high - change.mean, change.mean - change.low)
    wanted = count * (half / distance) ** 2 if distance > 0 else math.inf
    return _MOST_NEEDED if wanted >= _MOST_NEEDED else max(count + 1, math.ceil(wanted))


def summarise(
    tokens: list[dict[str, Any]], texts: list[dict[str, str]], markers: Watched, config: dict[str, Any]
) -> Diagnosis:
    """config: what was asked for, bins, margin, loss_target and contexts among it. Raises ValueError where no token counts."""
    table = _Table(tokens)
    if not table.tokens.sum() > 0:
        raise ValueError(
            "masks, skip_first_tokens: expected a token that counts in the loss; got none. Leave fewer tokens out."
        )
    words = {word: (word,) for word in markers.ids} | {"all": markers.summed}
    return Diagnosis(
        tokens,
        {word: _moves(table, of, config["margin"]) for word, of in words.items()},
        _curves(table, markers.summed, config["bins"]),
        _means(table),
        texts,
        config | {"watched": {word: list(ids) for word, ids in markers.ids.items()}},
        markers.note,
    )


class _Table:
    """Columns of the tokens, and their sums over each completion, [completions]. inside: which tokens to sum, all for None."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.completion = np.unique([row["completion"] for row in rows], return_inverse=True)[1]
        self.position = np.array([row["position"] for row in rows])
        self.weight = np.array([row["weight"] for row in rows])
        self.names = [name for name, value in rows[0].items() if isinstance(value, float) and name != "weight"]
        self._columns: dict[str, np.ndarray] = {}
        self.tokens = self.sums(None)

    def column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            values = np.array([row[name] for row in self.rows])
            # where student and teacher agree, the denominator is rounding
            self._columns[name] = values.clip(max=FRACTION_CEILING) if name.endswith("reference_fraction") else values
        return self._columns[name]

    def sums(self, name: str | None, inside: np.ndarray | None = None) -> np.ndarray:
        weight = self.weight if inside is None else self.weight * inside
        values = np.ones(len(weight)) if name is None else np.where(weight > 0, self.column(name), 0.0)
        return np.bincount(self.completion, weight * values, minlength=self.completion.max() + 1)

    def mean(self, *names: str, inside: np.ndarray | None = None) -> Interval:
        """Of the columns' sum, per token."""
        below = self.tokens if inside is None else self.sums(None, inside)
        above = np.sum([self.sums(name, inside) for name in names], axis=0)
        return ratio(above.tolist(), below.tolist(), within=_range(names[0]))


def _range(name: str) -> tuple[float, float]:
    """What a mean can be; an interval ends there."""
    if name.split("_")[-1] in ("moved", "overlap", "changed") or "/" in name:  # shares and probabilities
        return 0.0, 1.0
    return (-1.0, 1.0) if "cos_" in name else (-math.inf, math.inf)


def _moves(table: _Table, words: tuple[str, ...], margin: float) -> dict[str, Any]:
    found: dict[str, Any] = {x: table.mean(*(f"{x}/{word}" for word in words)).mean for x in CONTEXTS}
    found |= {name: _change(table, words, x) for name, x in (("change", "target"), ("teacher_change", "teacher"))}
    return found | {"verdict": verdict(found["change"], margin)}


def _change(table: _Table, words: tuple[str, ...], context: str, inside: np.ndarray | None = None) -> Interval | None:
    """The words' probability in a context relative to the base's, or None where the base has none."""
    ours, base = (np.sum([table.sums(f"{x}/{word}", inside) for word in words], axis=0) for x in (context, "base"))
    return ratio(ours.tolist(), base.tolist(), within=(0.0, math.inf)) if base.sum() > 0 else None


def _means(table: _Table) -> dict[str, Interval]:
    found = {name: table.mean(name) for name in table.names}
    entropy = table.column("student_entropy")
    forks = entropy >= np.quantile(entropy[table.weight > 0], 1 - FORKS)
    if table.sums(None, forks).sum() > 0:
        found |= {f"fork/{name}": table.mean(name, inside=forks) for name in ("target_base_kl", "teacher_base_kl")}
        above = table.sums("target_entropy", forks) - table.sums("student_entropy", forks)
        found["fork/entropy_gained"] = ratio(above.tolist(), table.sums(None, forks).tolist())
    return found | {"tokens": Interval(float(len(table.rows)), None, None)}


def _curves(table: _Table, words: tuple[str, ...], bins: int) -> list[dict[str, Any]]:
    longest = 1 + int(table.position.max())
    width = -(-longest // min(bins, longest))
    points = []
    for start in range(0, longest, width):
        inside = (table.position >= start) & (table.position < start + width)
        counted = inside & (table.weight > 0)
        if not counted.any():
            continue
        point: dict[str, Any] = {"position": start + (width - 1) / 2, "tokens": int(counted.sum())}
        point["completions"] = len(set(table.completion[counted]))
        point |= {name: table.mean(name, inside=inside) for name in CURVES}
        for context in CONTEXTS:
            point[f"{context}/markers"] = table.mean(*(f"{context}/{word}" for word in words), inside=inside)
        point["change"] = _change(table, words, "target", inside)
        points.append(point)
    return points
