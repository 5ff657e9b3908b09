"""What a rank knows of its entries of a row, added up over the ranks that hold the others.

Every reduction along the vocabulary ends in one of these, [C] numbers that a block of rows has left. Of a vocabulary that is
whole they are what came in. docs/vocabulary_parallel.md counts the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Vocabulary:
    """The entries in use that this rank holds: ``total`` in all, its own from ``first`` on. By default all of them.

    group: the name of the ranks' process group. widest: entries of the largest shard, by which all ranks plan their chunks: a
    rank that took fewer rows at a time than another would take part in more reductions, and wait for ever.
    """

    group: str | None = None
    first: int = 0
    total: int = 0
    widest: int = 0

    def entries(self, held: int) -> int:
        """Of the whole vocabulary, where this rank holds so many."""
        return held if self.group is None else self.total

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Σ over the ranks, of any shape, in float32."""
        return part if self.group is None else self._reduced(part, dist.ReduceOp.SUM)

    def max(self, part: torch.Tensor) -> torch.Tensor:
        """The largest of any rank. A NaN may be lost, and is in the sum that follows."""
        return part if self.group is None else self._reduced(part, dist.ReduceOp.MAX)

    def any(self, part: torch.Tensor) -> torch.Tensor:
        """Whether it holds on some rank, bool."""
        return part if self.group is None else self.sum(part) > 0

    def sums(self, *parts: torch.Tensor) -> Sequence[torch.Tensor]:
        """`sum` of vectors of one shape, in one collective."""
        return parts if self.group is None else self.sum(torch.stack([x.float() for x in parts])).unbind()

    def logsumexp(self, part: torch.Tensor) -> torch.Tensor:
        """Log-normalisers of whole rows from those of the shards."""
        if self.group is None:
            return part
        most = self.max(part)
        return most + self.sum(torch.exp(part - most)).log()

    def add(self, total: torch.Tensor) -> None:
        """`sum` in place: the gradient of the hidden states, of which each rank has what its rows of the head add."""
        if self.group is not None:
            dist.all_reduce(total, group=group_named(self.group))

    def local(self, token_ids: torch.Tensor, held: int) -> torch.Tensor:
        """Ids as columns of this rank's ``held`` entries: -1 where there is no token, -2 where another rank has it."""
        if self.group is None:
            return token_ids
        column = token_ids - self.first
        elsewhere = torch.where((token_ids < 0) | (token_ids >= self.total), -1, -2)
        return torch.where((column >= 0) & (column < held), column, elsewhere)

    def of_tokens(self, columns: torch.Tensor, *parts: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the rank that has a token says of it, [C] each; NaN where there is none. columns: from `local`."""
        if self.group is None:
            return parts
        whole = self.sums(*(x.where(columns >= 0, 0.0) for x in parts))
        return [x.where(columns != -1, torch.nan) for x in whole]

    def _reduced(self, part: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        assert self.group is not None
        whole = part.to(torch.float32, copy=True).contiguous()
        dist.all_reduce(whole, op=operation, group=group_named(self.group))
        return whole


def group_named(name: str) -> dist.ProcessGroup:
    """Of this process; an operator's arguments can hold its name and not the group."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


WHOLE = Vocabulary()
