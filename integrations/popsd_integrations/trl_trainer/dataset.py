"""What the trainer asks of a dataset: its columns, and that every row becomes prompts that the model can read. And the
tokenizer that makes prompts of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, ProcessorMixin

from popsd_integrations.commandline.options import ANSWER_COLUMN, SOLUTION_COLUMNS, WRONG_COLUMN
from popsd_integrations.huggingface.prompts import (
    ContextBuilder,
    Problem,
    Prompts,
    other_solutions,
    thinking_states,
)
from popsd_integrations.huggingface.sampling import check_fits, check_head, position_limit
from popsd_integrations.runs.held_out import Judge
from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig

logger = logging.getLogger(__name__)

OTHER_COLUMN = "other_privileged_context"
IMAGE_COLUMNS = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")


def problem_of(row: Mapping[str, Any]) -> Problem:
    """The problem in a row of a dataset. Raises ValueError where a column is missing."""
    column = next((name for name in SOLUTION_COLUMNS if name in row), None)
    if column is None or "prompt" not in row:
        raise ValueError(f"expected the columns 'prompt' and one of {list(SOLUTION_COLUMNS)}; got {list(row)}.")
    return Problem(row["prompt"], row[column], row.get(WRONG_COLUMN), row.get(OTHER_COLUMN))


def with_other_solutions(dataset: Any, name: str, args: PurifiedOPSDConfig) -> Any:
    """The dataset, where a context is given another problem's solution with that in `OTHER_COLUMN`, drawn by ``args.seed``.

    Raises ValueError for a stream, whose other problems are not known, for rows without two different solutions, and for a
    column of that name.
    """
    if not args.context_config().needs_other:
        return dataset
    if isinstance(dataset, dict):
        return {key: with_other_solutions(part, f"{name}[{key!r}]", args) for key, part in dataset.items()}
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name}: expected a datasets.Dataset for 'other_problem', which draws from all rows; got a stream. Load it "
            "whole, or choose another reference."
        )
    if OTHER_COLUMN in dataset.column_names:
        raise ValueError(f"{name}: expected no column {OTHER_COLUMN!r}, which is drawn here; got one. Rename it.")
    column = next(column for column in SOLUTION_COLUMNS if column in dataset.column_names)
    texts = dataset[column][:]
    unusable = next((row for row, text in enumerate(texts) if not isinstance(text, str) or not text.strip()), None)
    if unusable is not None:
        raise ValueError(f"{name}, row {unusable}: solution: expected non-empty text; got {texts[unusable]!r}.")
    try:
        return dataset.add_column(OTHER_COLUMN, other_solutions(texts, args.seed))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_evaluation(eval_dataset: Any, args: PurifiedOPSDConfig) -> None:
    """Raise ValueError for options of an evaluation that has no data."""
    for name in ("eval_scorer", "eval_problems"):
        if eval_dataset is None and getattr(args, name) is not None:
            raise ValueError(
                f"{name}: expected None without an eval_dataset; got {getattr(args, name)!r}. Pass one; popsd train takes it "
                "from dataset_test_split where eval_strategy is not 'no'."
            )


def check_columns(dataset: Any, name: str, args: PurifiedOPSDConfig) -> None:
    """Raise TypeError or ValueError for what is no dataset, or one without the columns that are needed. Reads no row."""
    if isinstance(dataset, dict) and name != "train_dataset":
        for key, part in dataset.items():
            check_columns(part, f"{name}[{key!r}]", args)
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"{name}: expected a datasets.Dataset or IterableDataset; got {type(dataset).__name__}. "
            "datasets.Dataset.from_list makes one of a list of rows; of a DatasetDict pass one split."
        )
    if name == "train_dataset" and args.num_generations > 1 and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name}: expected a datasets.Dataset with num_generations={args.num_generations}; got a stream, whose rows TRL "
            "takes once each. Load it whole, or sample one completion of each prompt."
        )
    columns = dataset.column_names
    if columns is None:  # a stream that does not know them; its first row shows them
        return
    if "prompt" not in columns or not set(SOLUTION_COLUMNS) & set(columns):
        raise ValueError(
            f"{name}: expected the columns 'prompt' and one of {list(SOLUTION_COLUMNS)}; got {columns}. "
            "Rename them with dataset.rename_column."
        )
    if name != "train_dataset" and args.eval_scorer is not None and ANSWER_COLUMN not in columns:
        raise ValueError(
            f"{name}: expected the column {ANSWER_COLUMN!r} for eval_scorer={args.eval_scorer!r}; got {columns}. popsd train "
            "takes it from answer_column; a solution with its answer in \\boxed{} is an answer too."
        )
    images = sorted(set(IMAGE_COLUMNS) & set(columns))
    if images:
        raise ValueError(
            f"{name}: expected text alone; got the columns {images}, which would be ignored. Where the problems do not "
            "need them, leave them out with dataset.remove_columns."
        )
    if args.loss_target == "contrastive_hints" and WRONG_COLUMN not in columns:
        raise ValueError(
            f"{name}: expected the column {WRONG_COLUMN!r} for loss_target='contrastive_hints'; got {columns}. It "
            "holds a wrong solution of each problem; another problem's will do."
        )


def check_rows(rows: int, step: int) -> None:
    """Raise ValueError where training data has fewer rows than one step takes."""
    if rows < step:
        raise ValueError(
            f"train_dataset: expected at least the {step} rows of one step (per_device_train_batch_size × "
            f"gradient_accumulation_steps × processes / num_generations); got {rows}. Lower one of them, or add data."
        )


class Counted(NamedTuple):
    """What a limit of ``allowed`` tokens does to the rows of a dataset. lengths: of each problem that stays, the tokens of its
    prompts, in the order of the fields of `Prompts`.
    """

    name: str
    rows: int
    dropped: int
    truncated: int
    allowed: int | None
    lengths: list[tuple[int, ...]]

    def __str__(self) -> str:
        longest = max(map(max, self.lengths))
        return (
            f"{self.name}: of {self.rows} problems {self.dropped} are dropped and {self.truncated} have their solution cut, "
            f"for prompts longer than max_prompt_length={self.allowed}. The longest that stays has {longest} tokens."
        )


class RowCheck:
    """Whether rows become prompts that fit ``model`` together with the longest completion.

    judge: of the answers in evaluation datasets, or None where nothing is judged.
    Raises ValueError for a ``vocab_size`` that the model's head has not.
    """

    def __init__(
        self, contexts: ContextBuilder, model: Any, args: PurifiedOPSDConfig, judge: Judge | None = None
    ) -> None:
        self.contexts, self.judge = contexts, judge
        self.args = args
        self._limit = position_limit(model)
        check_head(model, args.vocab_size)

    def prompts(self, problem: Problem, where: str) -> Prompts | None:
        """The prompts, or None where the row is dropped. Raises ValueError that says ``where``."""
        try:
            return self._fitting(problem)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _fitting(self, problem: Problem) -> Prompts | None:
        assert self.args.max_completion_length is not None
        prompts = self.contexts.build(problem)
        if prompts is not None:
            check_fits(prompts, self.args.max_completion_length, self._limit)
        return prompts

    def dataset(self, dataset: Any, name: str) -> Any:
        """The dataset without the rows that are dropped, of evaluation data the first ``eval_problems`` of it.

        Raises ValueError on a row that is no good. Of a stream the first row is looked at now, and each when it comes.
        """
        if isinstance(dataset, dict):
            return {key: self.dataset(part, f"{name}[{key!r}]") for key, part in dataset.items()}
        evaluated = name.startswith("eval")
        if evaluated and self.args.eval_problems is not None:
            dataset = dataset.take(self.args.eval_problems)
        if isinstance(dataset, IterableDataset):
            first = next(iter(dataset), None)
            if first is not None:
                self._warn_of_thinking(self._counting_apart()._checked(first, f"{name}, row 0", evaluated))
            check = self if self.args.on_overflow == "drop" else self._counting_apart()

            def keeps(row: Mapping[str, Any], index: int) -> bool:
                return check._checked(row, f"{name}, row {index}", evaluated) is not None

            return dataset.filter(keeps, with_indices=True)
        keep, counted = self.kept(dataset, name)
        if counted.dropped or counted.truncated:
            logger.warning(counted)
        return dataset if len(keep) == len(dataset) else dataset.select(keep)

    def first(self, dataset: Any, name: str, count: int) -> list[Prompts]:
        """The prompts of the first rows that are not dropped, at most ``count``. Raises ValueError on one that is no good."""
        if isinstance(dataset, dict):
            return [prompts for key, part in dataset.items() for prompts in self.first(part, f"{name}[{key!r}]", count)]
        own = self._counting_apart()
        built = (own._checked(row, f"{name}, row {index}", False) for index, row in enumerate(dataset))
        return list(islice((prompts for prompts in built if prompts is not None), count))

    def kept(self, dataset: Dataset, name: str) -> tuple[list[int], Counted]:
        """The rows that are trained on, and what max_prompt_length does to the others. Raises ValueError as `dataset` does."""
        own, evaluated = self._counting_apart(), name.startswith("eval")
        keep: list[int] = []
        shown: Prompts | None = None
        lengths: list[tuple[int, ...]] = []
        for index, row in enumerate(dataset):
            prompts = own._checked(row, f"{name}, row {index}", evaluated)
            if prompts is not None:
                keep.append(index)
                shown = shown or prompts
                lengths.append(tuple(map(len, prompts)))
        limit, contexts = self.args.max_prompt_length, own.contexts
        counted = Counted(name, len(dataset), contexts.dropped, contexts.truncated, limit, lengths)
        if not keep:
            raise ValueError(
                f"{name}: expected at least one usable row; {counted.dropped} of {len(dataset)} were dropped."
            )
        self._warn_of_thinking(shown)
        return keep, counted

    def _checked(self, row: Mapping[str, Any], where: str, evaluated: bool) -> Prompts | None:
        try:
            problem = problem_of(row)
            if evaluated and self.judge is not None:
                self.judge.check(row.get(ANSWER_COLUMN))
            prompts = self._fitting(problem)
            if evaluated and prompts is not None and self.args.eval_max_completion_length is not None:
                check_fits(Prompts(prompts.question, [], []), self.args.eval_max_completion_length, self._limit)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return prompts

    def _counting_apart(self) -> RowCheck:
        """The same check with counters of its own, so that those of the run count what the run sees."""
        own = copy.copy(self)
        own.contexts = ContextBuilder(self.contexts.tokenizer, self.contexts.config, text_as_chat=False)
        return own

    def _warn_of_thinking(self, prompts: Prompts | None) -> None:
        states = {} if prompts is None else thinking_states(self.contexts.tokenizer, prompts)
        if len(set(states.values())) > 1:
            logger.warning(
                f"The prompts end in different thinking states: {states}. The completion's first tokens then mean "
                "something else to each. Set the same chat_template_kwargs, or skip_first_tokens."
            )


_FINGERPRINT_ROWS = 256


def fingerprint(dataset: Any) -> str:
    """What identifies training data, at little cost: its number of rows and a hash of 256 of them, evenly spaced from the
    first to the last. Of a stream, which can be read only by training on it, the columns.
    """
    if dataset is None or isinstance(dataset, IterableDataset):
        return "none" if dataset is None else f"a stream with the columns {sorted(dataset.column_names or ())}"
    rows = len(dataset)
    places = range(rows) if rows <= _FINGERPRINT_ROWS else np.linspace(0, rows - 1, _FINGERPRINT_ROWS).astype(int)
    columns = {"prompt", *SOLUTION_COLUMNS, WRONG_COLUMN, OTHER_COLUMN} & set(dataset.column_names)
    looked_at = dataset.select_columns(sorted(columns)).select(places)
    text = json.dumps(list(looked_at), default=str, sort_keys=True)
    return f"{rows} rows, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def sizes(data: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of each dataset, or that it is a stream."""
    parts = {
        f"{name} {key}".strip(): part
        for name, dataset in data.items()
        for key, part in (dataset.items() if isinstance(dataset, dict) else [("", dataset)])
    }
    return {name: "a stream" if isinstance(part, IterableDataset) else len(part) for name, part in parts.items()}


def tokenizer_of(given: Any, model: Any, args: PurifiedOPSDConfig) -> Any:
    """The tokenizer: the one given, a processor's, or the model's. TRL would load a processor where there is one.

    Raises ValueError where it has no end-of-sequence token.
    """
    tokenizer = given
    if given is None:
        source = model if isinstance(model, str) else model.config._name_or_path
        if not source:
            raise ValueError("processing_class: expected a tokenizer, since the model names no files; got None.")
        revision = (args.model_init_kwargs or {}).get("revision") or "main"
        options = {"revision": revision, "trust_remote_code": args.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", truncation_side="left", **options)
        if not tokenizer("a 0", add_special_tokens=False)["input_ids"]:
            raise ValueError(f"processing_class: expected a tokenizer; the one of {source!r} has no tokens for text.")
    elif isinstance(given, ProcessorMixin):
        tokenizer = copy.copy(given.tokenizer)
        tokenizer.chat_template = tokenizer.chat_template or given.chat_template
    if tokenizer.eos_token is None:
        raise ValueError("processing_class: expected a tokenizer with an eos_token; got None. Set tokenizer.eos_token.")
    return tokenizer
