"""What the miniature is judged by: accuracy, markers, length, finished completions, and the style gap before any
training.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from popsd import PurifiedConfig, purified_target_logits
from popsd.markers import EpistemicMarkers
from popsd_integrations.huggingface.heads import head_from_model, hidden_states
from popsd_integrations.huggingface.packing import pack
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.task import MAX_NEW_TOKENS, Puzzle, prompt_ids
from popsd_integrations.miniature.tokenizer import TOKEN_ID, build_tokenizer


class Score(NamedTuple):
    """Shares in [0, 1], but markers (per completion) and length (in tokens); at T = 1, but accuracy_greedy."""

    accuracy: float
    accuracy_greedy: float
    markers: float
    length: float
    eos_rate: float


def complete(model: Any, puzzles: list[Puzzle], temperature: float) -> list[list[int]]:
    """The student's completions: question only."""
    return sample(
        model,
        [prompt_ids(puzzle).question for puzzle in puzzles],
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=temperature,
        eos_token_id=[TOKEN_ID["EOS"]],
        pad_token_id=TOKEN_ID["PAD"],
    )


def accuracy(puzzles: list[Puzzle], completions: list[list[int]]) -> float:
    """Share of the completions that answer with the right pair."""
    return sum(puzzle.solved_by(ids) for puzzle, ids in zip(puzzles, completions, strict=True)) / len(puzzles)


def evaluate(model: Any, puzzles: list[Puzzle], seed: int = 0) -> Score:
    """Score on puzzles, in eval mode, with random draws of its own: the global generator stays as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sampled = complete(model, puzzles, temperature=1.0)
            greedy = complete(model, puzzles, temperature=0.0)
    finally:
        model.train(was_training)
    markers = EpistemicMarkers().count_ids(sampled, build_tokenizer())
    return Score(
        accuracy=accuracy(puzzles, sampled),
        accuracy_greedy=accuracy(puzzles, greedy),
        markers=markers.per_completion(),
        length=sum(map(len, sampled)) / len(sampled),
        eos_rate=sum(ids[-1] == TOKEN_ID["EOS"] for ids in sampled) / len(sampled),
    )


@torch.no_grad()
def style_gap(model: Any, puzzles: list[Puzzle], config: PurifiedConfig | None = None) -> dict[str, float]:
    """Mean P(MAYBE) at the first completion token under base, teacher, reference and the purified target.

    Taken before any training, it predicts the outcome: purified training keeps the markers where the target's
    probability is not below the base's.
    """
    maybe = TOKEN_ID["MAYBE"]
    head = head_from_model(model)
    logits = {}
    for name, context in (("base", "question"), ("teacher", "teacher"), ("reference", "reference")):
        packed = pack(
            [getattr(prompt_ids(puzzle), context) for puzzle in puzzles], [[maybe]] * len(puzzles), pad_token_id=0
        )
        states = hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
        logits[name] = torch.nn.functional.linear(packed.predicting(states)[:, 0], head.weight)
    logits["target"] = purified_target_logits(*logits.values(), config=config or PurifiedConfig())
    return {name: values.softmax(-1)[:, maybe].mean().item() for name, values in logits.items()}
