"""Prompts and completions in one padded batch, from lists of token ids or from padded tensors.

The loss compares four distributions at the same completion token. Every row therefore carries the columns of its own
completion, and the hidden states that predict its tokens are gathered by position, never by padded width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from popsd_integrations.huggingface.prompts import Prompts

PADDED, PACKED, BY_LENGTH = "padded", "packed", "by length"
"""How a forward takes the rows of a batch, see `forwards`."""

CONTEXT_OF = {"base": "question", "teacher": "teacher", "reference": "reference"}
"""Each frozen distribution and the field of `Prompts` that it reads. The student reads the base's."""


class Packed(NamedTuple):
    """Prompts and completions in one padded batch, and where each row's completion lies.

    input_ids, attention_mask, position_ids: [B, L] int64. spans: [B, 2] int64, first column of the completion and the
        column after its last. longest: T, tokens of the longest completion. side: where the padding is.
    lengths: tokens of each row's prompt and completion, on the host. layout: how `completion_states` runs the rows.
    position_ids count from each row's first token. Without them left padding shifts the positions, which costs bf16
    models a mean logit error of 2e-2 (with them at most 1e-4). The purified target is a difference of two forwards and
    does not tolerate that.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    spans: torch.Tensor
    longest: int
    side: str
    lengths: tuple[tuple[int, int], ...]
    layout: str = PADDED

    @property
    def completion_mask(self) -> torch.Tensor:
        """[B, T] bool: True on the tokens that exist."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        return torch.arange(self.longest, device=lengths.device) < lengths[:, None]

    @property
    def completion_ids(self) -> torch.Tensor:
        """[B, T] int64: the completions. Entries where completion_mask is False repeat the row's last token."""
        return self.input_ids.gather(1, self._columns(offset=0))

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states [B, L, D], those that predict each completion token (columns start - 1 to end - 2): [B, T, D].

        Entries where completion_mask is False repeat another position of the row. They are finite and must be masked.
        Raises ValueError where ``hidden`` has another B or L.
        """
        if hidden.ndim != 3 or hidden.shape[:2] != self.input_ids.shape:
            raise ValueError(
                f"hidden: expected shape [{self.input_ids.shape[0]}, {self.input_ids.shape[1]}, D] like the packed "
                f"batch; got {list(hidden.shape)}. Pass the states of a forward over these very input_ids."
            )
        columns = self._columns(offset=-1)
        return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))

    def rows(self, part: slice) -> Packed:
        """Some of the rows, with the width and the T of the whole batch."""
        return self._mapped(lambda x: x[part])._replace(lengths=self.lengths[part])

    def narrowed(self, rows: Sequence[int]) -> Packed:
        """Some of the rows in the width of the longest of them, with the T of the whole batch."""
        index = torch.tensor(rows, device=self.spans.device)
        lengths = tuple(self.lengths[row] for row in rows)
        width = max(map(sum, lengths))
        cut = self.input_ids.shape[1] - width if self.side == "left" else 0
        tables: dict[str, Any] = {
            name: getattr(self, name).index_select(0, index)[:, cut : cut + width] for name in _TENSORS[:3]
        }
        return self._replace(**tables, spans=self.spans.index_select(0, index) - cut, lengths=lengths)

    def to(self, device: torch.device | str | None) -> Packed:
        return self._mapped(lambda x: x.to(device))

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return self._replace(**changed)

    def _columns(self, offset: int) -> torch.Tensor:
        start, end = self.spans[:, :1] + offset, self.spans[:, 1:] + offset
        return torch.minimum(start + torch.arange(self.longest, device=start.device), end - 1)


_TENSORS = Packed._fields[:4]


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    side: str = "left",
    layout: str = PADDED,
    device: torch.device | str | None = None,
) -> Packed:
    """Put each prompt before its completion, and pad to the longest row.

    prompts, completions: B lists of token ids without padding. side: "left" pads before the prompt, "right" after the
        completion. layout: how `completion_states` runs the rows; by default as the batch is, see `exact_layout`.
        device: where the result lies, None for the CPU.
    Raises ValueError on an empty prompt (nothing would predict the first token), on an empty completion, and where the
    numbers of prompts and completions differ.

    >>> packed = pack([[5], [5, 6, 7]], [[8, 9], [4]], pad_token_id=0)
    >>> packed.input_ids.tolist(), packed.spans.tolist(), packed.longest
    ([[0, 5, 8, 9], [5, 6, 7, 4]], [[2, 4], [3, 4]], 2)
    """
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(
            f"completions: expected one per prompt and at least one; got {len(prompts)} prompts and {len(completions)} "
            "completions. Repeat a prompt for each of its completions."
        )
    lengths = [(len(prompt), len(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    _check(side, lengths)  # before the padding, which cannot pad nothing
    tensors = (*padded(prompts, pad_token_id), *padded(completions, pad_token_id, side="right"))
    return pack_padded(*tensors, pad_token_id=pad_token_id, side=side, layout=layout, lengths=lengths).to(device)


def pack_contexts(
    prompts: Sequence[Prompts],
    completions: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    contexts: Sequence[str] = tuple(CONTEXT_OF),
    side: str = "left",
    layout: str = PADDED,
    device: torch.device | str | None = None,
) -> dict[str, Packed]:
    """`pack` the same completions behind each context's prompts: what `frozen_states` takes.

    contexts: which of "base", "teacher" and "reference". The base reads the question, so its batch is the student's too.
    Raises ValueError on another name, and as `pack` does.

    >>> batches = pack_contexts([Prompts([1, 2], [1, 2, 3], [3])], [[7, 8]], pad_token_id=0)
    >>> {name: packed.input_ids.tolist() for name, packed in batches.items()}
    {'base': [[1, 2, 7, 8]], 'teacher': [[1, 2, 3, 7, 8]], 'reference': [[3, 7, 8]]}
    """
    if not set(contexts) <= CONTEXT_OF.keys():
        raise ValueError(f"contexts: expected some of {list(CONTEXT_OF)}; got {list(contexts)}.")
    rows = {name: [getattr(row, CONTEXT_OF[name]) for row in prompts] for name in contexts}
    options: dict[str, Any] = {"pad_token_id": pad_token_id, "side": side, "layout": layout, "device": device}
    return {name: pack(ids, completions, **options) for name, ids in rows.items()}


def pack_padded(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    pad_token_id: int,
    side: str = "left",
    layout: str = PADDED,
    lengths: Sequence[tuple[int, int]] | None = None,
) -> Packed:
    """`pack` for tensors that are padded already, on their device and without a loop over the rows.

    prompt_ids, completion_ids: [B, P] and [B, C] int64, padded anywhere. prompt_mask, completion_mask: of the same
        shapes, non-zero on the tokens. The result leaves out the columns that are padding in every row.
    lengths: tokens of each row's prompt and completion, where the host knows them; they must agree with the masks. None
        reads them from the device, for which the host waits once.
    Raises ValueError as `pack` does, and where shapes disagree.

    >>> ids, mask = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
    >>> pack_padded(ids, mask, ids, mask, pad_token_id=0).input_ids.tolist()
    [[0, 0, 5, 5], [6, 7, 6, 7]]
    """
    for name, ids, mask in (
        ("prompt_mask", prompt_ids, prompt_mask),
        ("completion_mask", completion_ids, completion_mask),
    ):
        if ids.ndim != 2 or ids.shape != mask.shape or len(ids) != len(prompt_ids):
            raise ValueError(
                f"{name}: expected the shape [{len(prompt_ids)}, L] of its ids; got {list(mask.shape)} for ids "
                f"{list(ids.shape)}."
            )
    if lengths is None:
        counts: list[list[int]] = torch.stack([prompt_mask.bool().sum(1), completion_mask.bool().sum(1)], 1).tolist()
        lengths = [(prompt, completion) for prompt, completion in counts]
    _check(side, lengths, layout)
    width, longest = max(map(sum, lengths)), max(completion for _, completion in lengths)
    mask = torch.cat([prompt_mask, completion_mask], dim=1).ne(0).to(torch.int8)
    # A stable sort by the mask keeps the tokens in order and moves the padding to one side.
    order = mask.argsort(dim=1, stable=True, descending=side == "right")
    order = order[:, order.shape[1] - width :] if side == "left" else order[:, :width]
    attention_mask = mask.gather(1, order).long()
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1).gather(1, order)
    input_ids = input_ids.masked_fill(attention_mask == 0, pad_token_id)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    tokens = attention_mask.sum(1)
    end = torch.full_like(tokens, width) if side == "left" else tokens
    spans = torch.stack([end - completion_mask.ne(0).sum(1), end], dim=1)
    return Packed(input_ids, attention_mask, position_ids, spans, longest, side, tuple(lengths), layout)


def padded(
    rows: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    side: str = "left",
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of token ids as one batch: ids and mask, [B, L] int64 each.

    >>> [x.tolist() for x in padded([[1, 2], [3]], 0)]
    [[[1, 2], [0, 3]], [[1, 1], [0, 1]]]
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=value, padding_side=side).to(device)
        for x, value in ((tensors, pad_token_id), ([torch.ones_like(x) for x in tensors], 0))
    )
    return ids, mask


def unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Rows of a padded batch as lists of the ids whose mask is non-zero. The host waits for the device once.

    ids, mask: [B, L], ids not negative. Raises ValueError where the shapes differ.

    >>> unpad(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]]))
    [[5], [6, 7]]
    """
    if ids.shape != mask.shape or ids.ndim != 2:
        raise ValueError(f"mask: expected the shape [B, L] of ids; got {list(mask.shape)} for ids {list(ids.shape)}.")
    return [[token for token in row if token >= 0] for row in ids.masked_fill(mask == 0, -1).tolist()]


def joined(batches: Sequence[Packed]) -> Packed:
    """Packed batches over the same completions, one below the other in a batch as wide as the widest."""
    width = max(packed.input_ids.shape[1] for packed in batches)
    wide = [_widened(packed, width - packed.input_ids.shape[1]) for packed in batches]
    rows: dict[str, Any] = {name: torch.cat([getattr(packed, name) for packed in wide]) for name in _TENSORS}
    return wide[0]._replace(**rows, lengths=tuple(pair for packed in batches for pair in packed.lengths))


def _widened(packed: Packed, columns: int) -> Packed:
    """More padding on its side. The ids of the new columns repeat the outermost one, which is as masked as any."""
    left = packed.side == "left"
    edge = packed.input_ids[:, :1] if left else packed.input_ids[:, -1:]
    zeros = torch.zeros_like(edge).expand(-1, columns)

    def beside(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return torch.cat([new, old] if left else [old, new], dim=1)

    return packed._replace(
        input_ids=beside(edge.expand(-1, columns), packed.input_ids),
        attention_mask=beside(zeros, packed.attention_mask),
        position_ids=beside(zeros, packed.position_ids),
        spans=packed.spans + columns if left else packed.spans,
    )


def check_same_completions(**contexts: Packed) -> None:
    """Raise ValueError unless all packed batches carry the same completion ids, row by row. Keywords name them.

    It reads the batches on the host, so it is for batches packed by hand. `pack_contexts` needs no such check.
    """
    (first_name, first), *others = contexts.items()
    for name, packed in others:
        if len(packed.spans) != len(first.spans):
            raise ValueError(
                f"{name}: expected {len(first.spans)} rows as in {first_name}; got {len(packed.spans)}. "
                "Pack every context over the same completions."
            )
        for row, (a, b) in enumerate(zip(_completions(first), _completions(packed), strict=True)):
            if a != b:
                raise ValueError(
                    f"{name}: expected the completion ids of {first_name}; row {row} differs: {first_name} has "
                    f"{_shown(a)}, {name} has {_shown(b)}. Pack every context over the same token ids: decoding and "
                    "tokenizing a completion again does not return them."
                )


def _check(side: str, lengths: Sequence[tuple[int, int]], layout: str = PADDED) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"side: expected 'left' or 'right'; got {side!r}.")
    if layout not in (PADDED, PACKED, BY_LENGTH):
        raise ValueError(f"layout: expected one of {[PADDED, PACKED, BY_LENGTH]}; got {layout!r}.")
    for name, counts in zip(("prompts", "completions"), zip(*lengths, strict=True), strict=True):
        empty = [row for row, count in enumerate(counts) if count == 0]
        if empty:
            raise ValueError(
                f"{name}: expected at least one token in every row; got none in row {empty[0]} (rows affected: "
                f"{len(empty)}). Leave these rows out of the batch in every context."
            )


def _completions(packed: Packed) -> list[list[int]]:
    spans = packed.spans.tolist()
    return [ids[start:end] for ids, (start, end) in zip(packed.input_ids.tolist(), spans, strict=True)]


def _shown(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"{str(ids[:8])[:-1]}, … {len(ids)} tokens]"
