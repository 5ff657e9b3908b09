"""How often the host waits for the device: each wait stops it from queueing the next kernels."""

import sys
from collections import Counter
from operator import methodcaller

import pytest
import torch

pytest.importorskip("trl")

from torch.utils._python_dispatch import TorchDispatchMode
from trl_helpers import build, logs

from popsd_integrations.huggingface.packing import pack_padded, padded

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique_consecutive", "_unique2"}


def caller():
    """The module that asked: the innermost frame that is neither torch's nor this test's."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].split(".")[0] in ("torch", __name__.split(".")[0]):
        frame = frame.f_back
    return frame.f_globals["__name__"]


class Waits(TorchDispatchMode):
    """Counts what would wait on a GPU, by the module that asked for it: reads by the host, and sizes that depend on data."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self._monkeypatch = Counter(), monkeypatch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if name == "index" else []
        if name in WAITING or masks:
            self.found[caller()] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        for name in READS:
            self._monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._monkeypatch.undo()

    def _counting(self, method):
        def counted(*args, **kwargs):
            self.found[caller()] += 1
            return method(*args, **kwargs)

        return counted

    def of(self, package):
        return sum(count for name, count in self.found.items() if name.split(".")[0] == package)


def test_waits_are_found(monkeypatch):
    x = torch.tensor([1, 0, 2])
    for read in (
        *(methodcaller(name) for name in ("tolist", "cpu", "nonzero")),
        lambda x: int(x[2]),
        lambda x: x[x > 0],
    ):
        with Waits(monkeypatch) as waits:
            read(x)
        assert sum(waits.found.values()) >= 1
    with Waits(monkeypatch) as waits:
        x.cumsum(0).argsort().to(torch.float32)
    assert not waits.found


@pytest.mark.parametrize("options", [{}, {"lora": True, "batched_frozen": True}, {"frozen_batch_size": 2}])
def test_a_micro_batch_is_packed_without_a_wait(tmp_path, monkeypatch, options):
    trainer = build(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    real, seen = trainer._loss, []

    def counted(*args):
        with Waits(monkeypatch) as waits:
            result = real(*args)
        seen.append(waits)
        return result

    trainer._loss = counted
    trainer.train()
    assert len(seen) == 2 and logs(trainer)[0]["loss"] > 0
    assert [waits.of("popsd_integrations") for waits in seen] == [0, 0]


def test_lengths_that_the_host_does_not_know_cost_one_wait(monkeypatch):
    tensors = [*padded([[1], [2, 3]], 0), *padded([[4, 5], [6]], 0, side="right")]
    with Waits(monkeypatch) as waits:
        pack_padded(*tensors, pad_token_id=0)
    assert sum(waits.found.values()) == 1
