"""Accuracy of a student while it trains: held-out problems with answers, their verdicts, and the file of completions.

The verdicts are those of ``popsd evaluate``. Each problem is answered twice: sampled as in training, and greedily.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import Sampler
from popsd_integrations.run_folder import write_whole
from popsd_integrations.scoring import check_answer, scorer

FILE = "eval_completions.jsonl"
SAMPLED, GREEDY = "sampled", "greedy"


class Judge:
    """Judges completions and keeps them until they are taken.

    name: the scorer, as in ``popsd evaluate``. ends: the tokens that end a completion.
    Raises ValueError and ImportError as `scoring.scorer` does.
    """

    def __init__(self, name: str, tokenizer: Any, ends: Sequence[int]) -> None:
        self._score, self._tokenizer, self._ends = scorer(name), tokenizer, set(ends)
        self._records: list[dict[str, Any]] = []

    def check(self, answer: Any) -> str:
        """The answer as text. Raises ValueError where it is neither text nor a number, or the scorer cannot read it."""
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise ValueError(f"answer: expected text or a number; got {answer!r}. Leave such problems out of the data.")
        check_answer(self._score, str(answer))
        return str(answer)

    def add(self, kind: str, rows: Sequence[tuple[Sequence[int], Any]], completions: Sequence[Sequence[int]]) -> None:
        """Judge completions. rows: token ids of the question, and the answer. kind: SAMPLED or GREEDY."""
        for (question, answer), ids in zip(rows, completions, strict=True):
            text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
            self._records.append(
                {
                    "kind": kind,
                    "question": self._tokenizer.decode(list(question)),
                    "expected": str(answer),
                    "text": text,
                    "tokens": len(ids),
                    "finish": "stop" if ids and ids[-1] in self._ends else "length",
                    **self._score(text, str(answer))._asdict(),
                }
            )

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call."""
        taken, self._records = self._records, []
        return taken


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Problems on which the plain loop judges its student.

    prompts: as ``ContextBuilder`` builds them; the questions are used. answers: one for each. scorer: as in ``popsd
    evaluate``. problems: so many first ones are judged; None: all. max_new_tokens: of each completion; None: as in
    training, whose limit a long chain of thought may exceed.
    Raises ValueError for no problems, other numbers of answers, and numbers below 1.
    """

    prompts: Sequence[Prompts]
    answers: Sequence[str]
    scorer: str = "math"
    problems: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.answers):
            raise ValueError(
                f"held_out: expected problems and an answer for each; got {len(self.prompts)} prompts and "
                f"{len(self.answers)} answers. A problem that ContextBuilder drops has no prompts: drop its answer too."
            )
        for name in ("problems", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"held_out.{name}: expected at least 1, or None; got {value}.")

    def rows(self) -> list[tuple[Prompts, str]]:
        """The questions and answers that are judged."""
        rows = zip(self.prompts, self.answers, strict=True)
        return [(Prompts(prompts.question, [], []), answer) for prompts, answer in rows][: self.problems]

    def judge(self, tokenizer: Any, ends: Sequence[int]) -> Judge:
        """A judge that has checked all answers. Raises ValueError with the number of one that is no good."""
        judge = Judge(self.scorer, tokenizer, ends)
        for row, (_, answer) in enumerate(self.rows()):
            try:
                judge.check(answer)
            except ValueError as error:
                raise ValueError(f"held_out.answers[{row}]: {error}") from error
        return judge

    def measure(
        self,
        model: Any,
        judge: Judge,
        samplers: Mapping[str, Sampler],
        size: int,
        rows: Sequence[tuple[Prompts, str]],
    ) -> list[dict[str, Any]]:
        """Records of ``rows``, some of `rows`, by each sampler, ``size`` of them at a time."""
        for kind, sampler in samplers.items():
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                completions = sampler(model, [prompts for prompts, _ in part])
                judge.add(kind, [(prompts.question, answer) for prompts, answer in part], completions)
        return judge.take()


def accuracies(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """accuracy (sampled), accuracy_greedy, and truncated: the share of the sampled ones that the limit of tokens ended."""
    means = {}
    for kind, name in ((SAMPLED, "accuracy"), (GREEDY, "accuracy_greedy")):
        own = [record for record in records if record["kind"] == kind]
        if own:
            means[name] = sum(record["correct"] for record in own) / len(own)
        if own and kind == SAMPLED:
            means["truncated"] = sum(record["finish"] == "length" for record in own) / len(own)
    return means


def log(folder: Path, step: int, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Add the completions of one evaluation. name: of the set of problems."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "set": name, **x}, ensure_ascii=False) + "\n" for x in records)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects, which a kill may have cut short. None where there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def keep(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Leave the ``wanted`` lines of a file of JSON objects, if there is one."""
    if path.exists():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read_lines(path) if wanted(row)]
        write_whole(path, lambda file: file.write("".join(lines).encode()))
