"""What the plain loop evaluates beside its training: held-out problems, and a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from popsd_integrations.huggingface.distributed import agreed, rank
from popsd_integrations.huggingface.heads import eval_mode
from popsd_integrations.huggingface.sampling import Sampler, check_positions, own_randomness
from popsd_integrations.runs.held_out import GREEDY, SAMPLED, HeldOut, accuracies, log
from popsd_integrations.torch_loop.processes import own_seed, share, together


class Judged:
    """Held-out problems with the samplers that answer them.

    sampling: options of the training's `Sampler`. size: problems at a time.
    Raises ValueError for an answer that is no good and for a prompt that is too long, and as `scoring.scorer` does.
    """

    def __init__(
        self, held_out: HeldOut, model: nn.Module, tokenizer: Any, sampling: Mapping[str, Any], size: int
    ) -> None:
        self._held_out, self._size = held_out, size
        longest = held_out.max_new_tokens or sampling["max_new_tokens"]
        check_positions(model, [prompts for prompts, _ in held_out.rows()], longest)
        options = {**sampling, "max_new_tokens": longest}
        self._samplers = {
            SAMPLED: Sampler(model, tokenizer, **options),
            GREEDY: Sampler(model, tokenizer, **options | {"temperature": 0.0}),
        }
        self._judge = held_out.judge(tokenizer, self._samplers[GREEDY].eos_token_id)

    def __call__(self, model: Any, output: Path, step: int) -> dict[str, float]:
        """The accuracies over the problems of all processes. The completions are logged in ``output``."""
        part = share(self._held_out.rows())
        records = together(self._held_out.measure(model, self._judge, self._samplers, self._size, part))
        records.sort(key=lambda record: list(self._samplers).index(record["kind"]))  # as one process has them
        if rank() == 0:
            log(output, step, "held-out", records)
        return accuracies(records)


def evaluation(
    model: nn.Module,
    function: Callable[[Any], dict[str, float]] | None,
    judged: Judged | None,
    seed: int,
    output: Path,
    step: int,
) -> dict[str, float]:
    """All numbers as ``eval/…``. The random states stay as they are, and every evaluation begins at ``seed``.

    Raises ValueError where both give the same name.
    """
    found: dict[str, float] = {}
    with own_randomness(own_seed(seed)), eval_mode(model), torch.no_grad():
        for part in (None if judged is None else judged(model, output, step), function and function(model)):
            if common := sorted(found.keys() & (part or {}).keys()):
                raise ValueError(f"evaluate: expected other names than held_out's; got {', '.join(common)}.")
            found |= part or {}
    return agreed(lambda: {f"eval/{name}": float(value) for name, value in found.items()})
