"""What was meant, where a name is misspelt. Errors of the command line are one line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

OTHER_NAMES = {
    "--model": ["--model_name_or_path"],
    "--dataset": ["--dataset_name"],
    "--data": ["--dataset_name"],
    "--output": ["--output_dir"],
    "--split": ["--dataset_test_split"],
    "--question_column": ["--prompt_column"],
    "--scorer": ["--eval_scorer"],
    "--engine": ["--use_vllm"],
    "--vllm": ["--use_vllm"],
    "--engine_kwargs": ["--model_init_kwargs"],
    "--samples": ["--num_generations"],
    "--num_completions": ["--num_generations"],
    "--completions": ["--diagnose_problems"],
    "--max_new_tokens": ["--max_completion_length"],
    "--max_tokens": ["--max_completion_length"],
    "--max_length": ["--max_completion_length", "--max_prompt_length"],
    "--eval_max_new_tokens": ["--eval_max_completion_length"],
    "--batch_size": ["--per_device_train_batch_size", "--per_device_eval_batch_size"],
    "--steps": ["--max_steps"],
    "--seeds": ["--num_seeds"],
    "--lora": ["--use_peft"],
    "--gpu": ["--device"],
    "--processes": ["--num_processes"],
    "--lr": ["--learning_rate"],
    "--epochs": ["--num_train_epochs"],
}
"""Names that other tools, or popsd before its first release, have for an option: what it is called here."""


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """For the first option in ``text`` that is not known, the known one that was meant. "" where none is near.

    >>> did_you_mean("unrecognized arguments: --pmi_bta 2", ["--pmi_beta", "--beta"])
    ' Did you mean --pmi_beta?'
    >>> did_you_mean("unrecognized arguments: --scorer", ["--eval_scorer", "--seed"])
    ' Did you mean --eval_scorer?'
    """
    known = sorted(known)
    for option in re.findall(r"--\w+", text):
        if option not in known:
            other = [name for name in OTHER_NAMES.get(option, ()) if name in known]
            near = other or difflib.get_close_matches(option, known, n=1, cutoff=0.7)
            return f" Did you mean {near[0]}?" if near else ""
    return ""


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, which says what was meant by a misspelt command, value or option.

    known: options that another parser has read, and that may have been meant.
    """

    known: Iterable[str] = ()

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice is not None:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), n=1)
            message += f". Did you mean {near[0]}?" if near else ""
        if message.startswith("unrecognized arguments"):
            message += (meant := did_you_mean(message, [*self._option_string_actions, *self.known])) and f".{meant}"
        message = message.rstrip(".")
        self.exit(2, f"{self.prog}: {message}" + ("" if message.endswith("?") else f". See {self.prog} --help.") + "\n")


class Parser(OneLine):
    """One that takes no abbreviation: a shorter name would be answered by another option. An option of its help is a line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, "formatter_class": _Wide, **options})


class _Wide(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=120)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = getattr(action.type, "__name__", "str")
        return {"int": "N", "float": "X", "Path": "PATH", "json_object": "JSON", "boolean": "BOOL"}.get(name, "TEXT")
