"""What the trainer records of a batch, over all processes: means over rows and tokens, however these are split into batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from popsd_integrations.trl_trainer.compat import ends_of, record, record_extreme, record_means, rows_of_data

_NONE = 2**40
"""Longer than a completion: minus this is the longest of none."""
_RENAMED = {"student_entropy": "entropy", "kept_share": "masks/kept_share"}


@torch.no_grad()
def record_completions(trainer: Any, completions: list[list[int]]) -> None:
    """Markers and lengths of what was sampled, and what overflow did to the prompts."""
    completions = completions[: rows_of_data(trainer, len(completions))]
    counts = trainer._markers.count_ids(completions, trainer.processing_class)
    ends = {*ends_of(trainer), trainer.processing_class.pad_token_id}
    lengths = {"": list(map(len, completions)), "terminated_": [len(ids) for ids in completions if ids[-1] in ends]}
    local = [*counts.counts.values(), counts.total]
    local += [number for some in lengths.values() for number in (sum(some), len(some))]
    local += [max((sign * x for x in some), default=-_NONE) for some in lengths.values() for sign in (-1, 1)]
    parts = trainer.accelerator.gather(torch.tensor([local], device=trainer.accelerator.device)).tolist()
    *sums, shortest, longest, shortest_ended, longest_ended = map(list, zip(*parts, strict=True))
    *words, total, tokens, rows, ended_tokens, ended = map(sum, sums)
    rates = dict(zip(counts.counts, words, strict=True)) | {"per_completion": total}
    record_means(
        trainer,
        {f"markers/{name}": (value, rows) for name, value in rates.items()}
        | {
            "markers/per_thousand_tokens": (1000 * total, tokens),
            "completions/mean_length": (tokens, rows),
            "completions/clipped_ratio": (rows - ended, rows),
            "completions/mean_terminated_length": (ended_tokens, ended),
        },
    )
    extremes = {"": (shortest, longest), "terminated_": (shortest_ended, longest_ended)}
    for kind, (least, most) in extremes.items():
        if max(most) > -_NONE:
            record_extreme(trainer, f"completions/min_{kind}length", -max(least), min)
            record_extreme(trainer, f"completions/max_{kind}length", max(most), max)
    if trainer.args.on_overflow != "error":
        contexts = trainer._contexts
        record(trainer, {"contexts/dropped": contexts.dropped, "contexts/truncated": contexts.truncated})


@torch.no_grad()
def record_loss(trainer: Any, metrics: Mapping[str, torch.Tensor]) -> float:
    """Of means over this call's tokens, those over all tokens until the next logging step; of kept_share over weights.

    Returns how many tokens had a part in the loss, or what weight the masks left, on all processes.
    """
    metrics = dict(metrics)
    local = torch.cat([torch.stack([metrics.pop("tokens"), metrics.pop("weight")]), metrics.pop("run")])
    of_weight = [name == "kept_share" for name in metrics]
    sums = torch.stack([x * local[int(of)] for x, of in zip(metrics.values(), of_weight, strict=True)])
    # Here and not inside the wrapped forward, where a collective could meet FSDP's in another order on another rank.
    reduced = trainer.accelerator.reduce(torch.cat([sums, local]), "sum")
    *values, tokens, weight, run, positions = reduced.tolist()  # the one wait for the device
    names = [_RENAMED.get(name, name) for name in metrics]
    counts = [weight if of else tokens for of in of_weight]
    record_means(trainer, dict(zip(names, zip(values, counts, strict=True), strict=True)))
    record_means(trainer, {"forwards/padding_share": (positions - run, positions)})
    trainer._tokens_run += run
    return float(values[of_weight.index(True)] if any(of_weight) else tokens)
