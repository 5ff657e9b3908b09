"""Launch tables, refusals before a launch, and that no annealed number ever compiles a kernel again."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from kernel_helpers import run_without_interpreter

import popsd_kernels
from popsd_kernels import LogitTransform, RowOptions, Rows, checks, launch

COUNT_COMPILATIONS = """
from dataclasses import replace
import torch
import triton.compiler
import popsd_kernels
from popsd_kernels import Composed, LogitTransform, RowLoss, RowOptions, RowStatistics, Rows, launch
triton.compiler.compile = lambda *_, **__: object()  # counted by the key that asks for it
from popsd_kernels.aot.report import select_target
from popsd_kernels.device.targets import arithmetic_mix_logit
from popsd_kernels.sweeps import difference, loss_gradient, statistics
for kernel in (statistics.row_statistics_kernel, loss_gradient.row_loss_gradient_kernel, difference.logit_difference_kernel):
    select_target("sm_90", kernel)
meta, config = torch.device("meta"), launch.LaunchConfig(128, 4, 4)
def sweep(rows, options):
    s, u, d = torch.empty(3, rows, 4096, device=meta)
    chunk = torch.empty(rows + 1, device=meta)[1:]  # a slice that starts off 16 bytes
    out = launch.result_rows(len(RowLoss._fields), rows, meta)
    operands = Rows(s, base=u, difference=d, offset=chunk, teacher=s, reference=u, token_ids=chunk.long(), row_scale=chunk)
    second, outputs = operands.with_target(u), launch.Outputs(out, d)
    plans = [
        statistics.plan(operands, options, launch.Outputs(out, u), config, True),
        loss_gradient.plan(second, RowStatistics(*[chunk] * 4), options, outputs, config, True),
        difference.plan(operands, options, True, launch.Outputs(chunk, d), config, True),
    ]
    for plan in plans:
        plan.compile()
    return [len(plan.kernel.device_caches[0][0]) for plan in plans]
plain = RowOptions(entry_clip=0.05, token_clip=2.0, student=LogitTransform(1.0, 30.0))
print(sweep(16, plain))
for rows in (1, 2, 17, 1000, 4096):
    sweep(rows, plain)
for value in (0.25, 0.125, 0.875):
    sweep(16, replace(plain, beta=value))
for value in (1, 2, 0.3):
    sweep(16, replace(plain, pmi_beta=value, pmi_clip=value, inv_temperature=value, entry_clip=value, token_clip=value))
    sweep(16, replace(plain, delta_scale=value, student=LogitTransform(value, value), target=LogitTransform(value)))
print(sweep(16, plain))
for value in (0.1, 1e-4):
    small = sweep(16, replace(plain, beta=value))
print(small)
print(sweep(16, replace(plain, beta=0)))
for share in (0.3, 0, 1, 0.5):  # with a device function: one more kernel, whatever its numbers and the number of tokens
    for rows in (16, 17):
        s, u, t, r = torch.empty(4, rows, 4096, device=meta)
        made = Composed(arithmetic_mix_logit, (share,), torch.empty(rows, 3, device=meta), t)
        operands = Rows(s, base=u, teacher=t, reference=r, composed=made)
        out = launch.Outputs(launch.result_rows(len(RowStatistics._fields), rows, meta), t)
        planned = statistics.plan(operands, plain, out, config, True)
        planned.compile()
print(len(planned.kernel.device_caches[0][0]))
x = torch.zeros(2, 8)
popsd_kernels.row_statistics(Rows(x, target=x), RowOptions())
"""


@pytest.fixture(scope="module")
def compiling():
    """A process that compiles kernels instead of interpreting them; at last it gives them CPU tensors."""
    return run_without_interpreter("-c", COUNT_COMPILATIONS)


def test_annealing_and_the_number_of_tokens_never_recompile(compiling):
    assert len(compiling.stdout.splitlines()) == 5, compiling.stderr[-2000:]
    first, after, small, mode, composed = compiling.stdout.splitlines()
    assert first == after == "[1, 1, 1]"
    assert small == "[1, 2, 1]", "a weight below 1/8 is another kernel, the same for all of them"
    assert mode == "[1, 3, 1]", "another divergence is another kernel: the count can see a recompilation"
    assert composed == "2"


def test_cpu_tensors_without_the_interpreter_are_refused(compiling):
    assert compiling.returncode == 1
    assert "row_statistics: rows.student must be on a GPU, got the CPU" in compiling.stderr
    assert "TRITON_INTERPRET=1" in compiling.stderr


def test_devices_triton_does_not_drive_are_refused():
    with pytest.raises(RuntimeError, match=r"x must be on a GPU that Triton drives, got meta; move it"):
        checks.check_device("f", "x", torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
    ],
)
def test_unlisted_devices_take_the_nearest_older_table(capability, expected):
    assert launch.nearest_architecture(capability) == expected


def test_tables_name_every_kernel_and_fit_a_block():
    for architecture, table in launch.TABLES.items():
        assert set(table) == {
            "statistics", "loss_gradient", "loss_gradient_entry_clip", "difference", "masks", "moments",
            "single_read",
        }  # fmt: skip
        lanes = 64 if architecture.startswith("gfx") else 32
        assert all(config.num_warps * lanes <= 1024 for config in table.values())


@pytest.mark.parametrize("sizes", [(100, 4, 4), (128, 3, 4), (4, 8, 4)])
def test_launch_config_refuses_sizes_triton_cannot_tile(sizes):
    with pytest.raises(ValueError, match="powers of two"):
        launch.LaunchConfig(*sizes)


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
def test_result_rows_are_aligned_whatever_the_number_of_tokens(rows):
    out = launch.result_rows(9, rows, torch.device("cpu"))
    assert out.shape == (9, rows)
    assert len({(x.data_ptr() - out.data_ptr()) % 64 for x in out}) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: (x, RowOptions()), TypeError, r"rows must be a popsd_kernels\.Rows, got Tensor; pass Rows\(student"),
        (
            lambda x: (Rows(None, target=x), RowOptions()),
            TypeError,
            r"rows\.student must be a tensor, got NoneType; pass",
        ),
        (
            lambda x: (Rows(x, target=x), 0.5),
            TypeError,
            r"options must be a popsd_kernels\.RowOptions, got float; pass",
        ),
        (
            lambda x: (Rows(x, target=x[:1]), RowOptions()),
            ValueError,
            r"rows\.target must have shape .* got \[1, 8\]; slice",
        ),
        (lambda x: RowOptions(beta=1.5), ValueError, r"RowOptions: beta must be between 0 and 1, got 1\.5; 0 is KL"),
        (lambda x: RowOptions(renyi=1.0), ValueError, "RowOptions: renyi must lie between 0 and 1, got 1.0; beta=0 is"),
        (
            lambda x: RowOptions(pmi_beta=0),
            ValueError,
            "RowOptions: pmi_beta must be finite and above 0, got 0; leave it out",
        ),
        (lambda x: RowOptions(token_clip=float("nan")), ValueError, "token_clip must be finite and above 0, got nan"),
        (
            lambda x: LogitTransform(softcap=-1.0),
            ValueError,
            "LogitTransform: softcap must be finite and above 0, got -1.0",
        ),
    ],
)
def test_errors_are_in_the_words_of_the_kernels(call, error, message):
    with pytest.raises(error, match=message):
        popsd_kernels.row_statistics(*call(torch.zeros(2, 8)))


def test_without_triton_a_launcher_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "popsd_kernels.sweeps.statistics", raising=False)
    with pytest.raises(ModuleNotFoundError, match="row_statistics needs Triton, got none; pip install triton"):
        popsd_kernels.row_statistics  # noqa: B018


def test_every_name_is_listed():
    assert dir(popsd_kernels) == sorted(popsd_kernels.__all__) and all(
        hasattr(popsd_kernels, x) for x in dir(popsd_kernels)
    )


def test_the_snippet_of_the_package_runs(capsys, interpreter):
    lines = popsd_kernels.__doc__.splitlines()
    snippet = [line[4:] for line in lines if line.startswith("    ")]
    assert 10 < len(snippet) <= 20
    exec("\n".join(snippet), {})
    _loss, error = capsys.readouterr().out.splitlines()
    assert float(re.search(r"\d[\d.e-]*", error)[0]) < 1e-6
