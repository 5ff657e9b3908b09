"""Losses in wrappers on one process; ``integrations/processes`` has two."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from popsd_integrations.huggingface import agreed, global_num_items, join_processes, run_in_forward
from popsd_integrations.huggingface.distributed import everyones, is_running, unwrapped


class DeepSpeedEngine(nn.Module):
    """Known by its name."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self):
        self.calls += 1
        return self.module()


def test_run_in_forward_goes_through_the_wrapper_and_leaves_no_trace():
    inner = nn.Linear(2, 2)
    wrapper = DeepSpeedEngine(inner)
    ones = torch.ones(2)
    result = run_in_forward(wrapper, lambda: (is_running(inner), inner(ones)))  # the real forward, from within
    assert result[0] and not is_running(inner) and torch.equal(result[1], inner(ones)) and wrapper.calls == 1
    assert "forward" not in vars(inner)
    patched = inner.forward = lambda x: x + 1  # as accelerate patches it
    run_in_forward(wrapper, lambda: None)
    assert inner.forward is patched

    def fail():
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        run_in_forward(wrapper, fail)
    assert inner.forward is patched and not is_running(inner)


@pytest.mark.parametrize("order", ["wrapper of compiled", "compiled wrapper"])
def test_a_compiled_model_runs_uncompiled_and_in_its_wrapper(order):
    """Its graph is that of a forward that popsd does not call."""
    inner = nn.Linear(2, 2)
    compiled = order == "compiled wrapper"
    wrapper = DeepSpeedEngine(inner if compiled else torch.compile(inner))
    model = torch.compile(wrapper) if compiled else wrapper
    assert unwrapped(model) is inner

    def function():
        assert not torch.compiler.is_compiling()
        return is_running(inner)

    assert run_in_forward(model, function) and wrapper.calls == 1
    assert torch.equal(inner(torch.ones(2)), inner.forward(torch.ones(2)))


def test_one_process_counts_and_decides_alone():
    join_processes()
    assert not torch.distributed.is_initialized()
    items = global_num_items(torch.tensor([[True, False], [True, True]]), torch.tensor([0.25]))
    assert items.dtype is torch.float32 and items.item() == 3.25
    with pytest.raises(ValueError, match="masks: expected those of all micro-batches"):
        global_num_items()
    assert everyones(3) == [3] and agreed(lambda: 4) == 4
