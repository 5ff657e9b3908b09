"""How the plain loop shares a step between processes: rows out, gradients and metrics in.

The model is not wrapped. Every process has all of it, computes the gradient of its own rows, and adds the gradients up before
the optimiser's step. DDP does the same while backward runs, but lays out its buckets anew after its first step. A resumed
run would sum in another order than an unbroken one, and end at other bits.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from popsd_integrations.huggingface.distributed import everyones, is_around, processes, rank
from popsd_integrations.huggingface.heads import is_sharded

T = TypeVar("T")

_BUCKET = 2**25
"""Entries that are summed at a time: 128 MiB of float32."""


def check_shared(model: Any, batch_size: int) -> None:
    """Raise ValueError for a wrapped or sharded model, and for a batch that the processes cannot share evenly."""
    if is_around(model) or any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"model: expected the whole model, unwrapped, on each process; got {type(model).__name__} in a wrapper or sharded. "
            "The loop adds up the gradients itself. For a model that does not fit one GPU use the TRL trainer, or a loop of "
            "your own (docs/distributed.md)."
        )
    if batch_size % processes():
        raise ValueError(
            f"batch_size: expected a multiple of the {processes()} processes, which share it; got {batch_size}. Choose "
            "another, or start fewer processes."
        )


def check_same(facts: Mapping[str, Any], step: int) -> None:
    """Raise ValueError where a process has other options, data or weights than the first one, or sees another checkpoint.

    facts: of the run, by name. step: of the checkpoint.
    """
    found = everyones((facts, step))
    first, at = found[0]
    for number, (other, there) in enumerate(found):
        different = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if different:
            raise ValueError(
                f"train: expected the same on every process; process {number} differs from process 0 in "
                f"{', '.join(different)}. Build model, data and options alike, without the rank in a seed."
            )
        if there != at:
            raise ValueError(
                f"output_dir: expected a folder that all processes see; process 0 finds a checkpoint of step {at} there, "
                f"process {number} of step {there}. Put it on a file system that they share."
            )


def share(rows: Sequence[T]) -> Sequence[T]:
    """This process's part of the rows of all: in their order, as many as the others' or one more or less."""
    size, number = processes(), rank()
    return rows[number * len(rows) // size : (number + 1) * len(rows) // size]


def together(parts: Sequence[T]) -> list[T]:
    """What every process has of `share`, in the order of all."""
    return [item for part in everyones(list(parts)) for item in part]


def summed(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums over the processes, by name."""
    return {name: sum(part[name] for part in metrics) for name in metrics[0]}


def own_seed(seed: int) -> int:
    """A seed of this process: ``seed`` itself on the first one, so that one process draws as it always did."""
    return seed if rank() == 0 else random.Random(f"{seed}:{rank()}").getrandbits(63)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up each parameter's gradient over the processes, in float32.

    One that no process has a gradient for stays without. The buckets depend on the parameters alone, so equal gradients have
    equal sums, to the bit.
    """
    listed = list(parameters)
    if processes() == 1 or not listed:
        return
    has = torch.tensor([p.grad is not None for p in listed], dtype=torch.int32, device=listed[0].device)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    bucket: list[nn.Parameter] = []
    used = [p for p, known in zip(listed, has.tolist(), strict=True) if known]
    for place, parameter in enumerate(used):
        bucket.append(parameter)
        if place + 1 == len(used) or sum(p.numel() for p in bucket) + used[place + 1].numel() > _BUCKET:
            _sum_bucket(bucket)
            bucket = []


def _sum_bucket(parameters: Sequence[nn.Parameter]) -> None:
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
