"""How much of the work is done at a time: tokens per chunk and per gradient buffer, and vocabulary rows per matmul.

Matmuls on a GPU are cut into output tiles of 128 x 256 (cuBLAS, 16-bit operands, sm_80 and sm_90), which the multiprocessors
take in waves. A wave lasts as long whether it is full or not, so

    fill = tiles / (waves · multiprocessors)

is the share of the GPU that works. A projection [streams·rows, V] has hundreds of tiles and fills every wave but the last. The
gradient's matmul with the head [rows, D] has few, each over the whole vocabulary: 1,664 rows fill 79 % of 132
multiprocessors at D = 2048 and 98.5 % at 2560, 2,048 rows 97 % and 61 %. So rows are chosen by D and the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

CPU_WORKSPACE_MIB = 72.0
"""512 tokens at V = 32768 make three chunks instead of two with 96 MiB: 5 % more time in matmuls, 3 % less in page
faults (two cores). A decomposition's stream comes on top, for it would cost one more reading of the head."""
GPU_WORKSPACE_MIB = 2048.0
TILE = (128, 256)
"""Rows and columns of a matmul's output tile."""
BYTE = {2: 250.0, 4: 20.0}
"""Multiply-adds, times two, that the units for operands of so many bytes do while memory moves a byte: an H100's 750 TFLOP/s in
16 bits and 60 in float32, at 3.0 TB/s. Neighbouring devices are within a factor of two."""
GRADIENT_ROWS = 4096
"""More are never needed to fill a GPU, unless they are all there is."""


class Work(NamedTuple):
    """What a token costs. streams: 0 where logits are given, so that nothing is projected.

    logit_bytes, gradient_bytes: a token's workspace; no gradient_bytes where gradients take the place of logits.
    """

    vocab: int
    width: int = 0
    streams: int = 0
    operand_bytes: int = 4
    logit_bytes: int = 0
    gradient_bytes: int = 0
    with_gradient: bool = False
    with_dweight: bool = False


class Columns(NamedTuple):
    """Vocabulary rows of the head that the matmuls read; the sweeps always see ``vocab`` columns."""

    projected: int
    """Onto so many: whole tiles, or aligned ones, where the head has that many rows."""
    inner: int
    """The gradient's matmul with the head sums over so many at first, and over the few that are left after that."""


ALIGNED_DEVICES = ("cuda",)
ALIGNMENT = 8
"""Entries: cuBLAS loads 16 bytes at a time, and chooses slower kernels for dimensions that are no multiple of that."""


def vocabulary_columns(vocab: int, rows: int, device: torch.device) -> Columns:
    """How a vocabulary of ``vocab`` entries in use is multiplied by a head of ``rows`` rows.

    Projections onto a few rows too many go where nobody looks. The gradient is not multiplied by those rows: they may hold
    anything, NaN included, which a gradient of zero would not stop.
    """
    if device.type not in ALIGNED_DEVICES:
        return Columns(vocab, vocab)
    whole = -(-vocab // TILE[0]) * TILE[0]
    aligned = rows if rows % ALIGNMENT == 0 else vocab
    inner = vocab // ALIGNMENT * ALIGNMENT
    return Columns(whole if whole <= rows else aligned, inner if inner else vocab)


def slices(tokens: slice, step: int) -> Iterator[slice]:
    """Consecutive pieces of ``step`` tokens, the last one of what is left."""
    for start in range(tokens.start, tokens.stop, step):
        yield slice(start, min(start + step, tokens.stop))


def fill(rows: int, columns: int, processors: int) -> float:
    """Share of the multiprocessors that a matmul's output tiles keep busy."""
    tiles = _tiles(rows, columns)
    return tiles / (math.ceil(tiles / processors) * processors)


def plan_rows(
    tokens: int, work: Work, device: torch.device, workspace_mib: float | None = None, *, decompose: bool = False
) -> tuple[int, int]:
    """Tokens per chunk of logits, and per gradient buffer (a multiple of it), within ``workspace_mib`` or what is usual there.

    decompose: a decomposition's stream is among them.
    """
    usual = (CPU_WORKSPACE_MIB if device.type == "cpu" else GPU_WORKSPACE_MIB) * (4 / 3 if decompose else 1)
    budget = int((workspace_mib or usual) * 2**20)
    processors = multiprocessors(device)
    if processors is None or work.streams == 0:
        return simple_rows(max(tokens, 1), work, budget)
    return filling_rows(max(tokens, 1), work, budget, processors)


def multiprocessors(device: torch.device) -> int | None:
    """Of a GPU that CUDA or ROCm drives; None on other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def gradient_fill(plan: tuple[int, int], tokens: int, work: Work, processors: int) -> float:
    """`fill` of the gradient's matmuls with the head, over all buffers of a call."""
    buffers = [(_tiles(size, work.width), count) for size, count in _sizes(tokens, plan[1])]
    waves = sum(count * math.ceil(tiles / processors) for tiles, count in buffers)
    return sum(count * tiles for tiles, count in buffers) / (waves * processors)


def simple_rows(tokens: int, work: Work, budget: int) -> tuple[int, int]:
    """The plan without multiprocessors to fill: the largest chunk within ``budget`` bytes, and chunks equal to within a
    tile, so that no small last one runs at a fraction of the matmul's speed.
    """
    chunk = min(max(1, budget // (work.logit_bytes + work.gradient_bytes)), tokens)
    even = -(-tokens // -(-tokens // chunk))
    chunk = next(rows for unit in (128, 16, 1) if (rows := _up(even, unit)) <= chunk)
    return chunk, chunk


@lru_cache(maxsize=256)
def filling_rows(tokens: int, work: Work, budget: int, processors: int) -> tuple[int, int]:
    """Tokens per chunk of logits and per gradient buffer, a multiple of it, within ``budget`` bytes: the plan whose matmuls are
    predicted to take least time. Of plans within 3 %, less than the prediction is worth, one whose gradient's matmuls fill the
    GPU to 90 % if there is one, then the one with the largest chunks.
    """
    plans = {plan for plan in _plans(tokens, work, budget) if _workspace(plan, tokens, work) <= budget}
    if not plans:
        return 1, 1
    times = {plan: predicted_time(plan, tokens, work, processors) for plan in plans}
    enough = 1.03 * min(times.values())

    def worth(plan: tuple[int, int]) -> tuple[float, int, int]:
        return min(gradient_fill(plan, tokens, work, processors), 0.9), plan[0], -plan[1]

    return max((plan for plan in plans if times[plan] <= enough), key=worth)


def predicted_time(plan: tuple[int, int], tokens: int, work: Work, processors: int) -> float:
    """Of all matmuls, in multiply-adds times two: whole waves of tiles, and never less than their bytes take.

    A projection reads the head and writes its logits; dW is read and written once per gradient buffer. The sweeps take the same
    time in every plan, but for chunks of fewer rows than two per multiprocessor, which move 12 % more bytes.
    """
    chunk, rows = plan
    byte, vocab, width = BYTE[work.operand_bytes], work.vocab, work.width
    wave = 2.0 * TILE[0] * TILE[1] * processors
    time = 0.0
    for size, count in _sizes(tokens, rows):
        for part, repeats in _sizes(size, chunk):
            columns = work.streams * part
            waves = math.ceil(_tiles(columns, vocab) / processors)
            moved = byte * vocab * (work.operand_bytes * width + 4 * columns)
            time += count * repeats * max(wave * waves * width, moved)
        if work.with_gradient:
            time += count * wave * math.ceil(_tiles(size, width) / processors) * vocab
        if work.with_dweight:
            time += count * max(2.0 * size * width * vocab, byte * 8 * vocab * width)
    return time


def _plans(tokens: int, work: Work, budget: int) -> Iterator[tuple[int, int]]:
    """Chunks in half tiles, or all the tokens; smaller ones where a budget is so tight that two tiles of rows take half of it.

    Gradient buffers are the chunks that fit into so many tiles of rows, or all of them.
    """
    tight = 2 * TILE[1] * work.logit_bytes > budget
    chunks = {tokens, *range(TILE[0], min(tokens, GRADIENT_ROWS) + 1, TILE[0] // 2)}
    if tight or tokens < TILE[0]:
        chunks |= {rows for rows in (1, 2, 4, 8, *range(16, TILE[1], 16)) if rows <= tokens}
    for chunk in chunks:
        counts = {1}
        if work.gradient_bytes:
            tiles = range(1, GRADIENT_ROWS // TILE[0] + 1)
            counts |= {count for n in tiles if (count := n * TILE[0] // chunk)} | {-(-tokens // chunk)}
        for count in counts:
            if chunk * (count - 1) < tokens:
                yield chunk, chunk * count


def _workspace(plan: tuple[int, int], tokens: int, work: Work) -> int:
    return min(plan[0], tokens) * work.logit_bytes + min(plan[1], tokens) * work.gradient_bytes


def _sizes(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(size, how often) of pieces of ``step`` and the rest."""
    full, rest = divmod(total, step)
    if full:
        yield step, full
    if rest:
        yield rest, 1


def _tiles(rows: int, columns: int) -> int:
    return -(-rows // TILE[0]) * -(-columns // TILE[1])


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
