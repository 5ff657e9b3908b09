"""How the miniature is judged: accuracy, markers, length and finished completions, and the styles before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from popsd import PurifiedConfig, purified_target_logits
from popsd.markers import EpistemicMarkers
from popsd_integrations.huggingface.heads import eval_mode, head_from_model, hidden_states
from popsd_integrations.huggingface.packing import pack_contexts
from popsd_integrations.huggingface.sampling import own_randomness
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.task import MAX_NEW_TOKENS, Puzzle, prompt_ids
from popsd_integrations.miniature.tokenizer import TOKEN_ID, build_tokenizer


class Score(NamedTuple):
    """accuracy, accuracy_greedy, eos_rate: shares. markers: per completion. length: in tokens. Greedy only where named."""

    accuracy: float
    accuracy_greedy: float
    markers: float
    length: float
    eos_rate: float


def complete(model: Any, puzzles: list[Puzzle], temperature: float) -> list[list[int]]:
    """The student's completions of the questions."""
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
    """Score on puzzles, in eval mode. The global random generator stays as it was."""
    with eval_mode(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = complete(model, puzzles, temperature=1.0)
        greedy = complete(model, puzzles, temperature=0.0)
    markers = EpistemicMarkers().count_ids(sampled, build_tokenizer())
    return Score(
        accuracy=accuracy(puzzles, sampled),
        accuracy_greedy=accuracy(puzzles, greedy),
        markers=markers.per_completion(),
        length=sum(map(len, sampled)) / len(sampled),
        eos_rate=sum(ids[-1] == TOKEN_ID["EOS"] for ids in sampled) / len(sampled),
    )


def example(models: Mapping[str, Any], puzzles: list[Puzzle]) -> dict[str, Any]:
    """One puzzle with the completion that each model samples at T = 1, all from the same seed.

    It is the first that base and purified solve and OPSD does not; the first of all where there is none such.
    Returns question, answer, wanted (whether it is such a puzzle) and completions: text, correct and tokens by model.
    """
    made = {}
    for name, model in models.items():
        with eval_mode(model), own_randomness(0):
            made[name] = complete(model, puzzles, temperature=1.0)
    solved = {name: [x.solved_by(ids) for x, ids in zip(puzzles, rows, strict=True)] for name, rows in made.items()}
    pattern = [name != "opsd" for name in models]
    wanted = [list(row) == pattern for row in zip(*solved.values(), strict=True)]
    place = wanted.index(True) if any(wanted) else 0
    completions = {
        name: {
            "text": build_tokenizer().decode(rows[place], skip_special_tokens=True),
            "correct": solved[name][place],
            "tokens": len(rows[place]),
        }
        for name, rows in made.items()
    }
    puzzle = puzzles[place]
    question = f"Which two of {', '.join(map(str, puzzle.digits))} sum to {puzzle.target} modulo 10?"
    answer = f"{puzzle.pair[0]} and {puzzle.pair[1]}"
    return {"question": question, "answer": answer, "wanted": any(wanted), "completions": completions}


@torch.no_grad()
def style_gap(model: Any, puzzles: list[Puzzle], config: PurifiedConfig | None = None) -> dict[str, float]:
    """Mean P(MAYBE) at the first completion token under base, teacher, reference and the purified target.

    Measured before any training, it predicts the outcome: purified training keeps the markers where the target's
    probability is not below the base's.
    """
    maybe = TOKEN_ID["MAYBE"]
    head = head_from_model(model)
    logits, prompts = {}, [prompt_ids(puzzle) for puzzle in puzzles]
    for name, packed in pack_contexts(prompts, [[maybe]] * len(puzzles), pad_token_id=0).items():
        states = hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
        logits[name] = torch.nn.functional.linear(packed.predicting(states)[:, 0], head.weight)
    logits["target"] = purified_target_logits(*logits.values(), config=config or PurifiedConfig())
    return {name: values.softmax(-1)[:, maybe].mean().item() for name, values in logits.items()}
