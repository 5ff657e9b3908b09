"""Forwards that leave the padding out: the hidden states of a batch, whichever way its rows are run.

- "padded": the batch as it is.
- "packed": rows end to end, each with positions from 0. Attention that is told where rows end (flash, flex) takes them in one
  line and computes nothing in vain. Others have a mask over a whole line, so there are several lines of at most twice the
  longest row.
- "by length": rows of like length, one forward for each group. It asks nothing of the model that padding does not.

Without such attention rows by length cost the least. Of 8 rows of lognormal lengths, 39 % of them padding, at width 2048,
counting matmuls and attention: padded 1, packed .67, by length .61, the rows alone .59.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from popsd import head_logits
from popsd_integrations.huggingface.distributed import unwrapped
from popsd_integrations.huggingface.heads import (
    causal_model,
    eval_mode,
    head_from_model,
    hidden_states,
    in_forward,
    own_logits,
    tolerance,
)
from popsd_integrations.huggingface.packing import BY_LENGTH, PACKED, PADDED, Packed, pack
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import position_limit

logger = logging.getLogger(__name__)

_OF_A_FORWARD = 128
"""Tokens that cost what one more forward does. Fewer make more groups, more leave padding: at 128 about 4 % of the tokens."""
_KEPT = 24
"""Tokens of a row by which it is seen whether rows can be packed."""


class Work:
    """What forwards have run. tokens: without padding. positions: with it."""

    tokens = positions = 0

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / max(self.positions, 1)


_WORK: ContextVar[Work | None] = ContextVar("work", default=None)


@contextmanager
def counting() -> Iterator[Work]:
    """Counts what `completion_states` runs inside, `frozen_states` and `student_loss` included. The host knows the lengths.

    >>> packed = pack([[1], [2, 3]], [[4], [5]], pad_token_id=0)
    >>> with counting() as work:
    ...     states = completion_states(model, packed)
    >>> work.tokens, work.positions
    (5, 6)
    """
    work = Work()
    token = _WORK.set(work)
    try:
        yield work
    finally:
        _WORK.reset(token)


def completion_states(model: nn.Module, packed: Packed) -> torch.Tensor:
    """Last hidden states that predict each completion token, [B, T, D]: what a loss takes of one stream.

    packed: on the model's device; its ``layout`` says how the rows are run, and does not change the result but for rounding.
    By length takes as many forwards as the lengths ask for, so not under FSDP and ZeRO-3, where processes must run alike.
    Entries where ``packed.completion_mask`` is False repeat another position of the row. They are finite and must be masked.
    Raises ValueError as `hidden_states` does.

    >>> list(completion_states(model, pack([[1], [2, 3]], [[4, 5], [6]], pad_token_id=0)).shape)
    [2, 2, 16]
    """
    run = {PADDED: _padded, PACKED: _end_to_end, BY_LENGTH: _by_length}[packed.layout]
    return in_forward(model, lambda: run(model, packed))


def exact_layout(
    model: nn.Module,
    prompts: Sequence[Prompts] = (),
    *,
    padding_free: bool | None = None,
    one_forward: bool = False,
) -> str:
    """The layout of least work in which the model computes what it computes of each row alone.

    padding_free: True packs, and False pads. None packs where attention is told where rows end, else runs rows by length.
    one_forward: processes must run equally many forwards, as under FSDP and ZeRO-3, so not by length.
    prompts: two of them are used; none stands for token ids spread over the vocabulary. Rows of them are packed, and all
        their logits compared with those of the rows alone, within the tolerance of `check_model`. Then every other row is
        turned round, and a row must keep its logits within a twentieth of it, so that 16 bits hide no leak.
    Raises ValueError for padding_free=True where packed rows are not exact: recurrent states, convolutions, ALiBi, and
    attention that does not look at positions.

    >>> exact_layout(model), exact_layout(model, padding_free=True)
    ('by length', 'packed')
    """
    model = unwrapped(model)
    otherwise = PADDED if one_forward else BY_LENGTH
    if padding_free is False:
        return PADDED
    if padding_free is None and not (_is_told_rows(model) or one_forward):
        return otherwise
    cause = _why_not_packed(model, prompts)
    if cause is None:
        return PACKED
    how = causal_model(model).config.get_text_config()._attn_implementation
    text = f"{type(causal_model(model)).__name__} with {how} attention cannot take rows end to end: {cause}"
    if padding_free:
        raise ValueError(
            f"padding_free: expected a model whose packed rows do not see each other; {text}. Leave padding_free out, and "
            "rows of like length are run together."
        )
    logger.warning(f"{text}. Its forwards are run {otherwise}.")
    return otherwise


def _why_not_packed(model: nn.Module, prompts: Sequence[Prompts]) -> str | None:
    if getattr(causal_model(model).config.get_text_config(), "attention_chunk_size", None):
        from transformers import masking_utils

        if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
            return "this transformers counts the chunks of its attention over all rows"
    limit, over_tokens = tolerance(model)
    rows = _probe(model, prompts)
    lines = _lines(_counts(rows), _longest_line(model, _counts(rows)))
    last = next(line for line in lines if len(line) > 1)[-1]
    turned = [ids if row == last else ids[::-1] for row, ids in enumerate(rows)]
    with eval_mode(model), torch.no_grad():
        own = [own_logits(model, ids[:1], ids[1:]) for ids in rows]
        try:
            found, beside = _packed_logits(model, rows), _packed_logits(model, turned)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture may not take such rows at all
            return f"it raises {type(error).__name__}: {error}"

    def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
        by_token = (logits - expected).abs().amax(-1) / expected.abs().max().clamp(min=1e-6)
        return float(by_token.quantile(over_tokens).nan_to_num(torch.inf))

    apart = max(difference(logits, alone) for logits, alone in zip(found, own, strict=True))
    leak = difference(beside[last], found[last])
    if apart <= limit and leak <= limit / 20:
        return None
    return f"their logits differ from those of the rows alone by {apart:.3g} of the largest, and by {leak:.3g} with other rows"


def _probe(model: nn.Module, prompts: Sequence[Prompts]) -> list[list[int]]:
    """Six rows of three lengths, without a completion of their own: all positions are compared."""
    if prompts:
        first, second = prompts[0], prompts[min(1, len(prompts) - 1)]
        contexts = [list(ids[-_KEPT:]) for ids in (first.teacher, second.reference, first.question)]
    else:
        vocab_size = causal_model(model).get_input_embeddings().weight.shape[0]
        contexts = [[(3 + 7 * (place + start)) % vocab_size for place in range(14 - start)] for start in (0, 4, 9)]
    longer = [(ids * 3)[: max(3, len(ids))] for ids in contexts]
    return [row for ids in longer for row in (ids, [*ids[1:], ids[0]])]


def _packed_logits(model: nn.Module, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    device = causal_model(model).get_input_embeddings().weight.device
    prompts, completions = [ids[:1] for ids in rows], [ids[1:] for ids in rows]
    packed = pack(prompts, completions, pad_token_id=0, layout=PACKED, device=device)
    states, head = completion_states(model, packed), head_from_model(model)
    rows_of_states = (x[: len(ids)].to(head.weight.dtype) for x, ids in zip(states, completions, strict=True))
    return [head_logits(x, head) for x in rows_of_states]


def _padded(model: nn.Module, packed: Packed) -> torch.Tensor:
    _note(packed, packed.input_ids.numel())
    return packed.predicting(hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids))


def _by_length(model: nn.Module, packed: Packed) -> torch.Tensor:
    counts = list(map(sum, packed.lengths))
    groups = _groups(counts)
    if len(groups) == 1 and max(counts) == packed.input_ids.shape[1]:
        return _padded(model, packed)
    states = torch.cat([_padded(model, packed.narrowed(rows)) for rows in groups])
    places = {row: place for place, row in enumerate(row for rows in groups for row in rows)}
    order = torch.tensor([places[row] for row in range(len(counts))])
    return states.index_select(0, order.to(states.device))


def _end_to_end(model: nn.Module, packed: Packed) -> torch.Tensor:
    counts = list(map(sum, packed.lengths))
    told = _is_told_rows(model)
    lines = [list(range(len(counts)))] if told else _lines(counts, _longest_line(model, counts))
    width = max(sum(counts[row] for row in rows) for rows in lines)
    _note(packed, len(lines) * width)
    columns = packed.input_ids.shape[1]
    # On the host, which knows the lengths. The rest of a line is a row of its own, of a token that exists.
    first = [row * columns + (columns - count if packed.side == "left" else 0) for row, count in enumerate(counts)]
    source = torch.full((len(lines), width), first[0])
    positions = torch.arange(width).repeat(len(lines), 1)
    predicting = torch.empty(len(counts), packed.longest, dtype=torch.long)
    for line, rows in enumerate(lines):
        begin = 0
        for row in rows:
            end = begin + counts[row]
            source[line, begin:end] = torch.arange(first[row], first[row] + counts[row])
            positions[line, begin:end] = torch.arange(counts[row])
            prompt, completion = packed.lengths[row]
            predicting[row] = line * width + begin + prompt - 1 + torch.arange(packed.longest).clamp(max=completion - 1)
            begin = end
        positions[line, begin:] = torch.arange(width - begin)
    source, positions, predicting = (x.to(packed.spans.device) for x in (source, positions, predicting))
    input_ids = packed.input_ids.flatten().index_select(0, source.flatten()).view_as(source)
    further = _row_ends(counts, packed.spans.device) if told and _implementation(model) != _FLEX else {}
    states = hidden_states(model, input_ids, None, positions, **further).flatten(0, 1)
    return states.index_select(0, predicting.flatten()).view(*predicting.shape, -1)


_FLEX = "flex_attention"


def _is_told_rows(model: nn.Module) -> bool:
    """Whether its attention computes rows in one line apart, rather than to mask out what they see of each other."""
    return _implementation(model) == _FLEX or "flash" in _implementation(model)


def _implementation(model: nn.Module) -> str:
    return str(causal_model(model).config.get_text_config()._attn_implementation)


def _row_ends(counts: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What flash attention is called with. Without it each layer would read the position_ids and wait for the device."""
    ends = torch.tensor([0, *counts]).cumsum(0).to(device=device, dtype=torch.int32)
    return {f"cu_seq_lens_{x}": ends for x in "qk"} | {f"max_length_{x}": max(counts) for x in "qk"}


def _longest_line(model: nn.Module, counts: Sequence[int]) -> int:
    """Twice the longest row: a mask over a line costs its square. But no more than the model's positions, beyond which some
    models have no mask (GPT-Neo)."""
    return max(max(counts), min(2 * max(counts), position_limit(model) or 2 * max(counts)))


def _lines(counts: Sequence[int], longest: int) -> list[list[int]]:
    """Rows in lines of equal length, at most ``longest``, with the fewest positions in all.

    >>> _lines([4, 3, 3, 2], 8)
    [[0, 3], [1, 2]]
    """
    best: list[list[int]] = [[row] for row in range(len(counts))]
    fewest = len(counts) * max(counts)
    order = sorted(range(len(counts)), key=lambda row: -counts[row])
    for number in range(len(counts) - 1, 0, -1):
        lines: list[tuple[int, int, list[int]]] = [(0, line, []) for line in range(number)]
        for row in order:  # the longest row left, to the shortest line
            length, line, rows = lines[0]
            heapq.heapreplace(lines, (length + counts[row], line, [*rows, row]))
        width = max(length for length, _, _ in lines)
        if width > longest:
            break
        if number * width < fewest:
            fewest, best = number * width, [rows for _, _, rows in sorted(lines, key=lambda x: x[1])]
    return best


def _groups(counts: Sequence[int]) -> list[list[int]]:
    """Rows of like length together: the least padding, with `_OF_A_FORWARD` for each group. In order where it is one.

    >>> _groups([900, 90, 100, 1000])
    [[1, 2], [0, 3]]
    """
    order = sorted(range(len(counts)), key=lambda row: counts[row])
    cost, begins = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = counts[order[end - 1]]
        total, begin = min((cost[begin] + (end - begin) * longest + _OF_A_FORWARD, begin) for begin in range(end))
        cost.append(total)
        begins.append(begin)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return groups[::-1]


def _counts(rows: Sequence[Sequence[int]]) -> list[int]:
    return [len(row) for row in rows]


def _note(packed: Packed, positions: int) -> None:
    work = _WORK.get()
    if work is not None:
        work.tokens += sum(map(sum, packed.lengths))
        work.positions += positions
