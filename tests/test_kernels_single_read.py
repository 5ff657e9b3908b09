"""The single-read variant, phase by phase in the interpreter, against the two sweeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_helpers import (  # first: switches the interpreter on
    BLOCK,
    Guarded,
    poisoned,
    relative_error,
    run_without_interpreter,
    small_blocks,  # noqa: F401
)

from popsd_kernels import LogitTransform, RowOptions, launch, row_loss_gradient, row_statistics, single_read

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = RowOptions()
HARD = RowOptions(
    inv_temperature=0.8, pmi_beta=0.5, pmi_clip=2.0, entry_clip=0.02, token_clip=0.3, student=LogitTransform(0.7, 8.0)
)


@pytest.mark.parametrize("vocabulary", [97, BLOCK, 2 * BLOCK + 1, 5 * BLOCK])
@pytest.mark.parametrize("options", [PLAIN, replace(PLAIN, beta=0.0), replace(PLAIN, beta=1.0), HARD])
def test_as_the_two_sweeps(options, vocabulary, monkeypatch):
    monkeypatch.setattr(single_read, "shipped_config", launch.shipped_config)
    torch.manual_seed(vocabulary)
    student = torch.randn(3, vocabulary) * 3
    base, delta = student + torch.randn(3, vocabulary), torch.randn(3, vocabulary)
    student[1, 5] = base[1, 5] = float("-inf")
    offset, row_scale, token_ids = delta.mean(1), torch.tensor([1.5, 1.0, 0.0]), torch.tensor([3, -1, 7])
    target, expected_gradient = torch.empty(3, vocabulary), torch.empty(3, vocabulary)
    statistics = row_statistics(student, base, delta, offset, options=options, target_out=target)
    second = {"options": options, "token_ids": token_ids, "row_scale": row_scale}
    loss = row_loss_gradient(student, target, statistics, purified=True, gradient=expected_gradient, **second)
    inputs, gradient = [Guarded(x) for x in (student, base, delta)], poisoned(3, vocabulary)
    found = single_read.row_single_read(*(x.view for x in inputs), offset, gradient=gradient.view, **second)
    for x in inputs:
        x.assert_unchanged()
    gradient.assert_intact()
    for x, y in zip((*found[0], *found[1]), (*statistics, *loss), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert relative_error(gradient.view, expected_gradient) < 1e-5
    assert (gradient.view[2] == 0).all()


def test_a_masked_nan_row_gets_zeros(monkeypatch):
    monkeypatch.setattr(single_read, "shipped_config", launch.shipped_config)
    streams = list(torch.randn(3, 2, 300))
    streams[0][1] = float("nan")
    gradient = poisoned(2, 300, torch.bfloat16)
    row_scale = torch.tensor([1.0, 0.0])
    single_read.row_single_read(*streams, torch.zeros(2), options=PLAIN, row_scale=row_scale, gradient=gradient.view)
    assert (gradient.view[1] == 0).all() and gradient.view[0].abs().sum() > 1e-3


COMPILE = """
import torch
from popsd_kernels import RowOptions, launch, single_read
from popsd_kernels.aot import select_target
meta = torch.device("meta")
for architecture in ("sm_90", "sm_100"):
    s, b, d = torch.empty(3, 64, 151936, device=meta)
    vector = torch.empty(64, device=meta)
    select_target(architecture, single_read.row_single_read_kernel)
    gradient, out = torch.empty(64, 151936, dtype=torch.bfloat16, device=meta), launch.result_rows(13, 64, meta)
    config = launch.TABLES[architecture]["single_read"]
    plan = single_read.plan(
        s, b, d, vector, vector.long(), vector, gradient, out,
        single_read.scratch_for(s, config), RowOptions(), config, True, 0,
    )
    ptx = plan.compile().asm["ptx"]
    print(ptx.count("ld.global.gpu.acquire"), ptx.count("atom.global.gpu.acq_rel"))
"""


def test_the_waiting_form_compiles():
    finished = run_without_interpreter("-c", COMPILE)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.splitlines() == ["2 3", "2 3"], "two waits; a ticket and two arrivals"
