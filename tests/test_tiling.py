"""The workspace plan, and the mean row of a head."""

import dataclasses

import pytest
import torch

import popsd
from popsd.config import Impl
from popsd.streams import Problem
from popsd.testing import make_head, make_hidden, relative_l2
from popsd.tiling import CPU_WORKSPACE_MIB, GPU_WORKSPACE_MIB, plan_rows, resolve_impl
from popsd.types import mean_row


def problem(tokens: int, device: str = "cpu", workspace_mib: float | None = None) -> Problem:
    x = torch.empty(tokens, 8, device=device)
    return Problem(x, x, None, None, None, popsd.DivergenceConfig(), workspace_mib=workspace_mib)


@pytest.mark.parametrize("tokens", [1, 2, 17, 130, 513, 8192, 65536])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mib", [None, 0.001, 8.0, 1024.0])
@pytest.mark.parametrize("vocab", [97, 32768, 151936, 262144])
def test_the_plan_keeps_to_its_budget(tokens, device, mib, vocab):
    logit_bytes, gradient_bytes = 12 * vocab, 2 * vocab
    chunk, rows = plan_rows(problem(tokens, device, mib), logit_bytes, gradient_bytes)
    assert 1 <= chunk <= tokens and rows >= chunk and rows % chunk == 0
    budget = (mib or (CPU_WORKSPACE_MIB if device == "cpu" else GPU_WORKSPACE_MIB)) * 2**20
    assert chunk == 1 or chunk * logit_bytes + min(rows, tokens) * gradient_bytes <= budget


def test_a_decomposition_reads_the_head_no_more_often_than_the_loss_alone():
    plain = problem(512, "cpu")
    decomposing = dataclasses.replace(plain, decompose=popsd.config.Method.LOGITS)
    assert plan_rows(plain, 12 * 32784, 0) == plan_rows(decomposing, 16 * 32784, 0) == (176, 176)


def test_default_gpu_plan_fills_the_gradient_product_within_two_gib():
    chunk, rows = plan_rows(problem(8192, "meta"), 12 * 151936, 2 * 151936)
    assert rows >= 1024 and chunk >= 512


def test_auto_is_torch_where_triton_does_not_drive_the_device():
    assert resolve_impl(Impl.AUTO, torch.device("cpu")) is Impl.TORCH
    assert resolve_impl(Impl.AUTO, torch.device("mps")) is Impl.TORCH
    assert resolve_impl(Impl.TORCH, torch.device("cuda")) is Impl.TORCH
    assert resolve_impl(Impl.TRITON, torch.device("cpu")) is Impl.TRITON


def test_the_mean_row_follows_the_weight():
    head = make_head(50, 6)
    first = mean_row(head, 40)
    assert relative_l2(first, head.weight[:40].double().mean(0)) < 1e-6
    assert mean_row(head, 40) is first
    head.weight.mul_(2.0)
    assert relative_l2(mean_row(head, 40), head.weight[:40].double().mean(0)) < 1e-6
    assert relative_l2(mean_row(head, 50), head.weight.double().mean(0)) < 1e-6


def test_the_exact_difference_changes_nothing_in_float32():
    hidden, head = make_hidden(9, 16, 0.3), make_head(101, 16)
    exact = popsd.linear_purified_jsd(hidden, head, config=popsd.PurifiedConfig(exact_difference=True))
    assert torch.equal(exact.loss, popsd.linear_purified_jsd(hidden, head).loss)
