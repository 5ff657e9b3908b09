"""How completions are asked for. What they depend on is kept beside them, so that two settings never mix in one file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the command line reads its options before it imports torch
    from popsd_integrations.huggingface.prompts import ContextConfig

ENGINES = ("transformers", "vllm")
FILE = "generations.jsonl"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What the completions of a model depend on, its weights aside.

    temperature 0 is greedy. top_p, top_k: 1 and 0 are no filter. The defaults are the model card's of Qwen3 with thinking,
    since the paper states none. max_completion_length: the public OPSD code's.
    question_template, system_prompt, chat_template_kwargs: see ``ContextConfig``, of whose student this is the prompt.
    model_init_kwargs: for ``from_pretrained`` or ``vllm.LLM``, such as the dtype.
    Raises ValueError for values out of range.
    """

    model: str
    engine: str = "transformers"
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_completion_length: int = 38912
    seed: int = 0
    question_template: str = (
        "{question}\n\nReason step by step, and write the final answer within \\boxed{} at the end."
    )
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine: expected one of {ENGINES}; got {self.engine!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number of at least 0; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], and 1 for no filter; got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, which is no filter; got {self.top_k}.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length: expected at least 1; got {self.max_completion_length}.")
        for name in ("chat_template_kwargs", "model_init_kwargs"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}: expected a JSON object; got {getattr(self, name)!r}.")
        self.contexts()

    def contexts(self) -> ContextConfig:
        """The prompts: the question's alone is used."""
        from popsd_integrations.huggingface.prompts import ContextConfig

        return ContextConfig(
            question_template=self.question_template,
            system_prompt=self.system_prompt,
            student_kwargs=self.chat_template_kwargs,
        )

    def plain(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        return dataclasses.asdict(self)

    def differences(self, kept: Mapping[str, Any]) -> list[str]:
        """Names of the options that are others in ``kept``, with both values."""
        ours = self.plain()
        kept = {"model_init_kwargs": {}, **kept}  # not written by versions that did not compare it
        return [
            f"{name} ({kept.get(name)!r} there, {ours.get(name)!r} here)"
            for name in dict.fromkeys([*ours, *kept])
            if kept.get(name) != ours.get(name)
        ]


def labelled(name: str, usual: str) -> tuple[str, str]:
    """Label and place of ``label=place``, or ``usual`` and the place. A folder may have "=" in its own name."""
    label, equals, place = name.partition("=")
    return (label, place) if equals and label and not Path(name).exists() else (usual, name)


class Task(NamedTuple):
    """One problem of a benchmark. problem: its place there, from 0."""

    benchmark: str
    problem: int
    question: str
    answer: str


def seed_of(*parts: object) -> int:
    """A seed that depends on nothing but ``parts``, so that a batch is the same whenever it is sampled."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big")
