"""The single-read variant, phase by phase in the interpreter, against the two sweeps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import (
    BLOCK,
    Guarded,
    poisoned,
    relative_error,
    rows_of,
    run_without_interpreter,
    small_blocks,  # noqa: F401
)

from popsd_kernels import LogitTransform, RowOptions, launch, row_loss_gradient, row_statistics
from popsd_kernels.checks import share_memory
from popsd_kernels.sweeps import few_rows, row_slices, single_read

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = RowOptions()
HARD = RowOptions(
    inv_temperature=0.8, pmi_beta=0.5, pmi_clip=2.0, entry_clip=0.02, token_clip=0.3, student=LogitTransform(0.7, 8.0)
)


SIZES = [97, 2 * BLOCK + 1, 3 * BLOCK]
"""A masked slice alone; full slices and a masked one; full slices alone."""


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("options", [PLAIN, replace(PLAIN, beta=0.0), replace(PLAIN, beta=1.0), HARD])
def test_as_the_two_sweeps(options, vocabulary, monkeypatch):
    monkeypatch.setattr(single_read, "shipped_config", launch.shipped_config)
    torch.manual_seed(vocabulary)
    student = torch.randn(3, vocabulary) * 3
    base, delta = student + torch.randn(3, vocabulary), torch.randn(3, vocabulary)
    student[1, 5] = base[1, 5] = float("-inf")
    offset, row_scale, token_ids = delta.mean(1), torch.tensor([1.5, 1.0, 0.0]), torch.tensor([3, -1, 7])
    target, expected_gradient = torch.empty(3, vocabulary), torch.empty(3, vocabulary)
    rows = rows_of(student, base, delta, offset, token_ids=token_ids, row_scale=row_scale)
    statistics = row_statistics(rows, options, target_out=target)
    loss = row_loss_gradient(rows.with_target(target), statistics, options, gradient=expected_gradient)
    inputs, gradient = [Guarded(x) for x in (student, base, delta)], poisoned(3, vocabulary)
    rows = rows_of(*(x.view for x in inputs), offset, token_ids=token_ids, row_scale=row_scale)
    found = single_read.row_single_read(rows, options, gradient=gradient.view)
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
    rows = rows_of(*streams, torch.zeros(2), row_scale=row_scale)
    single_read.row_single_read(rows, PLAIN, gradient=gradient.view)
    assert (gradient.view[1] == 0).all() and gradient.view[0].abs().sum() > 1e-3


@pytest.mark.parametrize("launcher", [few_rows.row_split_sweeps, single_read.row_single_read])
@pytest.mark.parametrize(
    ("beta", "clips"),
    [(beta, clips) for beta in (0.0, 0.5, 1.0) for clips in ((None, None), (0.02, None))] + [(0.5, (None, 0.3))],
)  # token_clip comes after every sum, in a line that all modes share
def test_a_nan_stays_in_its_row(beta, clips, launcher, monkeypatch):
    """Rows 0 to 2: one NaN in the student, the base, the difference; row 3 is clean."""
    for module in (few_rows, single_read):
        monkeypatch.setattr(module, "shipped_config", launch.shipped_config)
    torch.manual_seed(0)
    streams, options = torch.randn(3, 4, 300), replace(PLAIN, beta=beta, entry_clip=clips[0], token_clip=clips[1])
    for i in range(3):
        streams[i, i, 99 * i] = float("nan")
    gradient, expected = poisoned(4, 300), torch.empty(1, 300)
    found = launcher(rows_of(*streams, torch.zeros(4)), options, gradient=gradient.view)
    loss = found[1]
    _, clean = few_rows.row_split_sweeps(
        rows_of(*streams[:, 3:].contiguous(), torch.zeros(1)), options, gradient=expected
    )
    assert loss.divergence[:3].isnan().all() and gradient.view[:3].isnan().all()
    torch.testing.assert_close(loss.divergence[3:], clean.divergence, rtol=1e-5, atol=1e-6)
    assert relative_error(gradient.view[3:], expected) < 1e-5


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_group_takes_every_other_row(groups, monkeypatch):
    """The loop over rows, with as many groups as a launch may have; in phases, since the interpreter cannot wait."""
    monkeypatch.setattr(single_read, "shipped_config", launch.shipped_config)
    streams = list(torch.randn(3, 3, 300))
    results, original = [], single_read.plan
    for count in (3, groups):
        monkeypatch.setattr(
            single_read, "plan", lambda call, counters, _, n=count, **k: original(call, counters, n, **k)
        )
        gradient = poisoned(3, 300)
        rows = rows_of(*streams, torch.zeros(3))
        statistics, loss = single_read.row_single_read(rows, PLAIN, gradient=gradient.view)
        gradient.assert_intact()
        results.append((*statistics, *loss, gradient.view))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, equal_nan=True)


GPU = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)


class Recorded(Exception):
    """A launch that would have happened."""


def _launched(monkeypatch, rows: int, vocabulary: int, options: RowOptions, properties: SimpleNamespace = GPU):
    """What `launch` hands to a GPU of those properties; tensors are on the meta device."""
    monkeypatch.setattr(single_read, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: torch.empty(*shape, dtype=dtype, device="meta"))

    def run(planned, device):
        raise Recorded(planned)

    monkeypatch.setattr(launch.Launch, "run", run)
    meta, config = torch.device("meta"), launch.TABLES["sm_90"]["single_read"]
    x, vector = torch.empty(rows, vocabulary, device=meta), torch.empty(rows, device=meta)
    operands, outputs = rows_of(x, x, x, vector), launch.Outputs(launch.result_rows(row_slices.RESULTS, rows, meta), x)
    partials = row_slices.partials_for(operands, config)
    call = row_slices.SliceCall(operands, options, outputs, partials, config, True)
    with pytest.raises(Recorded) as recorded:
        single_read.launch(call, torch.device("cuda"))
    return recorded.value.args[0]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "options", "programs", "registers"),
    [
        (1000, 151936, PLAIN, 5 * 75, 80),
        (3, 151936, PLAIN, 3 * 75, 80),
        (1000, 151936, HARD, 3 * 75, 128),
        (1000, 2048, PLAIN, 396, 80),
        (1000, 396 * 2048, PLAIN, 396, 80),
    ],
)
def test_the_grid_is_no_larger_than_what_is_resident(rows, vocabulary, options, programs, registers, monkeypatch):
    planned = _launched(monkeypatch, rows, vocabulary, options)
    assert planned.rows == programs
    assert planned.arguments["launch_cooperative_grid"] is True and planned.arguments["maxnreg"] == registers
    assert planned.rows * registers * 32 * planned.config.num_warps <= 132 * 65536
    assert planned.arguments["counters_ptr"].shape == (rows, 2)


def test_a_row_that_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="needs 397 programs at once; expected at most the 396 that cuda holds; use"):
        _launched(monkeypatch, 1, 396 * 2048 + 1, PLAIN)


def test_without_a_bound_on_registers_one_program_per_multiprocessor(monkeypatch):
    """AMD, whose compiler takes no bound."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    planned = _launched(monkeypatch, 1000, 151936, PLAIN, SimpleNamespace(multi_processor_count=304))
    assert planned.rows == 4 * 75 and "maxnreg" not in planned.arguments


def test_devices_without_cooperative_launches_are_refused():
    with pytest.raises(RuntimeError, match=r"rows\.student must be on a CUDA or ROCm GPU, got xpu"):
        single_read.resident_programs(8, 64, torch.device("xpu"))


@pytest.mark.parametrize("launcher", [few_rows.row_split_sweeps, single_read.row_single_read])
def test_a_gradient_that_siblings_would_read_is_refused(launcher):
    buffer = torch.zeros(4, 3, 300)
    student, base, delta = buffer[:3]
    rows = rows_of(student, base, delta, torch.zeros(3), token_ids=torch.zeros(3, dtype=torch.int64))
    narrow = delta.view(torch.bfloat16)[:, :300]
    for gradient, message in (
        (student, "gradient must not share memory with rows.student"),
        (buffer.view(-1)[150:1050].view(3, 300), "gradient must not share memory with rows.student"),
        (
            narrow,
            "gradient must be rows.difference itself or share no memory with it, got torch.bfloat16 with row stride 600",
        ),
        (buffer.view(-1)[950:1850].view(3, 300), "gradient must be rows.base itself"),
    ):
        with pytest.raises(ValueError, match=message):
            launcher(rows, PLAIN, gradient=gradient)


def test_memory_is_compared_byte_by_byte():
    buffer = torch.zeros(4, 30)
    left, middle, right = buffer[:, :10], buffer[:, 5:15], buffer[:, 20:]
    assert share_memory(left, middle) and share_memory(middle, left) and share_memory(buffer, right)
    assert not share_memory(left, right) and not share_memory(right, middle)
    assert not share_memory(buffer[:2], buffer[2:]) and share_memory(buffer[:3], buffer[2:])
    narrow = buffer.view(torch.bfloat16)[:, 20:40]  # the bytes of columns 10 to 20
    assert share_memory(narrow, middle) and not share_memory(narrow, left) and not share_memory(right, narrow)
    assert share_memory(buffer[:, 15:25][:2], buffer.view(-1)[:80].view(4, 20)), "other strides: taken to overlap"
    flat = torch.zeros(1000)
    assert not share_memory(flat[200:].view(20, 40), flat[:80].view(2, 40)), "each has a number of rows of its own"


COMPILE = """
import torch
from popsd_kernels import RowOptions, Rows, launch
from popsd_kernels.aot.report import select_target
from popsd_kernels.sweeps import row_slices, single_read
meta = torch.device("meta")
for architecture in ("sm_90", "sm_100"):
    s, b, d = torch.empty(3, 64, 151936, device=meta)
    vector = torch.empty(64, device=meta)
    select_target(architecture, single_read.row_single_read_kernel)
    gradient = torch.empty(64, 151936, dtype=torch.bfloat16, device=meta)
    outputs = launch.Outputs(launch.result_rows(row_slices.RESULTS, 64, meta), gradient)
    config = launch.TABLES[architecture]["single_read"]
    rows = Rows(s, base=b, difference=d, offset=vector, token_ids=vector.long(), row_scale=vector)
    call = row_slices.SliceCall(rows, RowOptions(), outputs, row_slices.partials_for(rows, config), config, True)
    counters = torch.empty(64, 2, dtype=torch.int32, device=meta)
    compiled = single_read.plan(call, counters, 5, 80).compile()
    assert compiled.metadata.launch_cooperative_grid
    ptx = compiled.asm["ptx"]
    print(ptx.count("ld.global.gpu.acquire"), ptx.count("atom.global.gpu.acq_rel"))
"""


def test_the_waiting_form_compiles():
    finished = run_without_interpreter("-c", COMPILE)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.splitlines() == ["2 2", "2 2"], "two waits and two arrivals"
