"""From heads whose rows are shared out among the ranks of a group to the rows of this one, and what the ranks must agree in."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from popsd.config import DivergenceConfig
from popsd.engine.vocabulary.reduce import Vocabulary
from popsd.engine.workspace import multiprocessors
from popsd.head import Head

Heads = tuple[Head, Head]
C = TypeVar("C", bound=DivergenceConfig)

SAME = 1e-3
"""How far apart hidden states of two ranks may be, relative to their norm: kernels that are tuned on each rank may round
otherwise, and tokens of another batch differ by 1."""


class _Facts(NamedTuple):
    """What a rank tells the others, one number each."""

    arguments: float
    """A checksum."""
    tokens: float
    student_rows: float
    frozen_rows: float
    student_width: float
    frozen_width: float


def are_sharded(heads: Heads | None, group: dist.ProcessGroup | None) -> bool:
    """Whether this rank holds a part of the vocabulary: with a group, or where a head is a DTensor."""
    return heads is not None and (
        group is not None or any(_is_dtensor(getattr(head, "weight", None)) for head in heads)
    )


def local_shards(
    heads: Heads,
    streams: dict[str, torch.Tensor],
    config: C,
    group: dist.ProcessGroup | None,
    *,
    look: bool,
    weights: torch.Tensor | None = None,
    arguments: Any = None,
) -> tuple[Heads, C, Vocabulary]:
    """This rank's rows of both heads, a configuration whose ``vocab_size`` is how many of them are in use, and which they are.

    group: None where the heads are DTensors, whose mesh has it. arguments: must print alike on all ranks. look: exchange what
        the ranks must agree in even if they have agreed in shards of this size and in these arguments before; the host waits.
    Raises ValueError on all ranks where they do not agree, and ValueError or TypeError for a group and heads that are none.
    """
    group = _group_of(heads, group)
    for name, x in streams.items():
        if _is_dtensor(x):
            raise TypeError(
                f"{name}: expected a plain tensor; got a DTensor. Pass to_local() of one that is replicated."
            )
    own, frozen = heads
    local_own = _local(own)
    local = (local_own, local_own if frozen is own else _local(frozen, like=(own, local_own)))
    shapes = [float(size) for axis in (0, 1) for size in (head.weight.shape[axis] for head in local)]
    device = next(iter(streams.values())).device
    facts = _Facts(float(zlib.crc32(repr((arguments, multiprocessors(device))).encode())), _tokens(streams), *shapes)
    key = (group, facts._replace(tokens=0.0), config.vocab_size)
    if look or key not in _agreed:
        _agreed[key] = _agree(group, facts, streams, weights, config.vocab_size)
    vocabulary, held = _agreed[key]
    return local, replace(config, vocab_size=held), vocabulary


_agreed: dict[Any, tuple[Vocabulary, int]] = {}


def _agree(
    group: dist.ProcessGroup,
    facts: _Facts,
    streams: dict[str, torch.Tensor],
    weights: torch.Tensor | None,
    vocab_size: int | None,
) -> tuple[Vocabulary, int]:
    """One collective: whether all ranks were given the same, and which rows each of them has in use."""
    device = next(iter(streams.values())).device
    own = torch.tensor(facts, dtype=torch.float64, device=device)
    own = torch.cat([own, *(_fingerprint(x, weights) for x in streams.values())])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    ranks = [_Facts(*numbers[: len(facts)]) for numbers in (x.tolist() for x in found)]
    for label in ("student", "frozen"):
        what = f"{label}_head: expected shards of one width on all ranks of the vocabulary"
        _check_same(ranks, f"{label}_width", what, "Pass rows of one head.")
    what = "hidden: expected the same tokens on all ranks of the vocabulary"
    _check_same(ranks, "tokens", what, _OTHER_TOKENS)
    prints = torch.stack(found)[:, len(facts) :].cpu()
    apart = ~torch.isclose(prints, prints[0].expand_as(prints), rtol=SAME, atol=0.0, equal_nan=True)
    if apart.any():
        rank, name = int(apart.any(dim=1).nonzero()[0]), list(streams)[int(apart.any(dim=0).nonzero()[0]) // 2]
        raise ValueError(
            f"{name}: expected the same on all ranks of the vocabulary; got others on rank {rank} than on rank 0. "
            f"{_OTHER_TOKENS}"
        )
    _check_same(ranks, "arguments", "vocab_group: expected the same options and arguments on all its ranks", "")
    for rank, x in enumerate(ranks):
        if x.student_rows != x.frozen_rows:
            raise ValueError(
                f"frozen_head: expected the student's shard of {x.student_rows:.0f} rows on rank {rank}; got "
                f"{x.frozen_rows:.0f}. Share both heads out alike."
            )
    return _rows_in_use([int(x.student_rows) for x in ranks], vocab_size, group)


_OTHER_TOKENS = (
    "Ranks with tokens of their own, as under data parallelism and FSDP, share no vocabulary: gather the head there."
)


def _check_same(ranks: Sequence[_Facts], name: str, expected: str, remedy: str) -> None:
    values = [getattr(x, name) for x in ranks]
    if len(set(values)) > 1:
        shown = "different ones" if name == "arguments" else [f"{x:.0f}" for x in values]
        raise ValueError(f"{expected}; got {shown}. {remedy}".rstrip())


def _rows_in_use(rows: list[int], vocab_size: int | None, group: dist.ProcessGroup) -> tuple[Vocabulary, int]:
    """Of shards of so many rows in the order of the ranks; the rows from ``vocab_size`` on are padding."""
    total = sum(rows) if vocab_size is None else vocab_size
    if total > sum(rows):
        raise ValueError(
            f"config.vocab_size: expected at most the {sum(rows)} rows that the {len(rows)} ranks hold; got {total}. "
            "Pass the group of all ranks that share the head."
        )
    starts = [sum(rows[:rank]) for rank in range(len(rows))]
    held = [min(count, total - start) for count, start in zip(rows, starts, strict=True)]
    if min(held) < 1:
        rank = next(rank for rank, count in enumerate(held) if count < 1)
        raise ValueError(
            f"vocab_group: expected a row in use on every rank; got none on rank {rank}, whose rows begin at {starts[rank]} of "
            f"{total}. Share the head out among fewer ranks."
        )
    rank = dist.get_rank(group)
    return Vocabulary(group.group_name, starts[rank], total, max(held)), held[rank]


def _fingerprint(stream: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The norm of the tokens that count, and of what is left if each is weighed by its place: [2] float64."""
    rows = stream.detach().flatten(0, -2).float().square().sum(dim=1, dtype=torch.float64)
    if isinstance(weights, torch.Tensor) and weights.numel() == len(rows):  # whose shape is checked later
        rows = torch.where(weights.reshape(-1) != 0, rows, 0.0)
    places = torch.arange(1, len(rows) + 1, dtype=torch.float64, device=rows.device)
    return torch.stack([rows.sum(), (rows * places).sum()])


def _tokens(streams: dict[str, torch.Tensor]) -> float:
    return float(next(iter(streams.values())).shape[:-1].numel())


def _group_of(heads: Heads, group: Any) -> dist.ProcessGroup:
    """The ranks that share the heads' rows: the mesh's, or those given."""
    meshes = [head.weight.device_mesh for head in heads if _is_dtensor(head.weight)]  # type: ignore[attr-defined]
    for label, head in zip(("student_head", "frozen_head"), heads, strict=True):
        for name in ("weight", "bias"):
            _check_placement(f"{label}.{name}", getattr(head, name), bool(meshes))
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(
            f"frozen_head: expected the student's mesh {meshes[0]}; got {meshes[-1]}. Share both out alike."
        )
    found = meshes[0].get_group() if meshes else group
    if not isinstance(found, dist.ProcessGroup):
        raise TypeError(
            f"vocab_group: expected a torch.distributed ProcessGroup or None; got {type(found).__name__}. "
            "Pass dist.group.WORLD or what dist.new_group returned."
        )
    if group is not None and group != found:
        raise ValueError("vocab_group: expected None or the group of the heads' mesh; got another. Leave it out.")
    if dist.get_rank(found) < 0:
        raise ValueError("vocab_group: expected a group that this rank is in; got another. Pass the rank's own.")
    return found


def _check_placement(label: str, tensor: torch.Tensor | None, sharded: bool) -> None:
    """All DTensors of a mesh, or all plain."""
    if tensor is None:
        return
    if _is_dtensor(tensor) != sharded:
        got = "a plain tensor" if sharded else "a DTensor"
        raise ValueError(
            f"{label}: expected {'a DTensor like the other' if sharded else 'a plain tensor like the other'} tensors of the "
            f"heads; got {got}. Share both heads out alike."
        )
    if not sharded:
        return
    from torch.distributed.tensor import Shard

    placements = tensor.placements  # type: ignore[attr-defined]
    if len(placements) != 1 or placements[0] != Shard(0):
        raise ValueError(
            f"{label}: expected a DTensor with Shard(0) on a mesh of one dimension; got {placements}. Redistribute it, or "
            "pass its full_tensor()."
        )


def _local(head: Head, like: tuple[Head, Head] | None = None) -> Head:
    """The head with this rank's rows; tensors that the first head ``like`` has too are the very ones of its second."""

    def part(name: str) -> torch.Tensor | None:
        tensor = getattr(head, name)
        if like is not None and tensor is getattr(like[0], name):
            return getattr(like[1], name)
        return tensor.to_local() if _is_dtensor(tensor) else tensor

    weight = part("weight")
    assert weight is not None
    return Head(weight, part("bias"), head.logit_scale, head.softcap)


def _is_dtensor(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "device_mesh")
