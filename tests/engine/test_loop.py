"""Who computes, and what changes nothing."""

import torch

import popsd
from popsd.config import Impl
from popsd.engine.backends import resolve_impl
from popsd.testing import make_head, make_hidden


def test_auto_is_torch_where_triton_does_not_drive_the_device():
    assert resolve_impl(Impl.AUTO, torch.device("cpu")) is Impl.TORCH
    assert resolve_impl(Impl.AUTO, torch.device("mps")) is Impl.TORCH
    assert resolve_impl(Impl.TORCH, torch.device("cuda")) is Impl.TORCH
    assert resolve_impl(Impl.TRITON, torch.device("cpu")) is Impl.TRITON


def test_the_exact_difference_changes_nothing_in_float32():
    hidden, head = make_hidden(9, 16, 0.3), make_head(101, 16)
    exact = popsd.linear_purified_jsd(hidden, head, config=popsd.PurifiedConfig(exact_difference=True))
    assert torch.equal(exact.loss, popsd.linear_purified_jsd(hidden, head).loss)
