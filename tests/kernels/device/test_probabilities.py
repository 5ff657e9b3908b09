"""What sweep 2 works on, from logits and normalisers, against the oracle's log-probabilities."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import interpreted, oracle_target, small_blocks  # noqa: F401

import triton.language as tl  # isort: skip

from popsd_kernels import LogitTransform, RowOptions, Rows, row_statistics
from popsd_kernels.device.logits import projection_stream
from popsd_kernels.device.probabilities import row_entries, row_scalars

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _probe(student, target, statistics, out_ptr, V: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, N)
    entries = row_entries(student, target, row_scalars(statistics, row), row, columns, V, True, False)
    out_ptr += row * 5 * N + columns
    tl.store(out_ptr, entries.p)
    tl.store(out_ptr + N, entries.q)
    tl.store(out_ptr + 2 * N, entries.log_p)
    tl.store(out_ptr + 3 * N, entries.log_q)
    tl.store(out_ptr + 4 * N, entries.t)


@pytest.mark.parametrize("gap", [1e-4, 1.0])
def test_entries(gap):
    torch.manual_seed(0)
    student = torch.randn(2, 200) * 5 + 20
    target = student + gap * torch.randn(2, 200)
    statistics = row_statistics(Rows(student, target=target), RowOptions())
    out = torch.full((2, 5, 256), float("nan"))
    streams = [projection_stream(x, None, LogitTransform(), 1.0) for x in (student, target)]
    interpreted(_probe)[(2,)](*streams, tuple(statistics), out, V=200, N=256)
    log_p, log_q = (oracle_target(RowOptions(), x, None) for x in (student, target))
    found, bits = out[:, :, :200].double(), torch.tensor(2.0, dtype=torch.float64).log()
    assert (found[:, 0] - log_p.exp()).abs().max() < 1e-6 and (found[:, 1] - log_q.exp()).abs().max() < 1e-6
    assert (found[:, 2] * bits - log_p).abs().max() < 5e-6 and (found[:, 3] * bits - log_q).abs().max() < 5e-6
    # t keeps what the difference of the two logarithms would lose: 2e-7 where log p has 2e-6
    assert (found[:, 4] * bits - (log_q - log_p)).abs().max() < 3e-7 * max(1.0, 4 * gap)
    assert (out[:, :2, 200:] == 0).all(), "no probability beyond the vocabulary"


def test_all_impossible_entries_are_uniform():
    impossible = torch.full((1, 200), float("-inf"))
    statistics = row_statistics(Rows(impossible, target=impossible), RowOptions())
    out = torch.full((1, 5, 256), float("nan"))
    stream = projection_stream(impossible, None, LogitTransform(), 1.0)
    interpreted(_probe)[(1,)](stream, stream, tuple(statistics), out, V=200, N=256)
    torch.testing.assert_close(out[0, 0, :200], torch.full((200,), 1 / 200))
    assert (out[0, 0, 200:] == 0).all() and (out[0, 4] == 0).all()
