"""Which kernels the matrix would launch on a GPU, found without one: its cases run at its real sizes on tensors that have no
memory, on a device that says it has 132 multiprocessors, and every launch is written down instead of made.

A matrix whose cases miss a kernel proves nothing about it: at 96 tokens every 16-bit case splits its rows over several
programs, and the two main sweeps never run.
"""

import ast
from pathlib import Path
from types import SimpleNamespace

import judge
import pytest
import torch
from matrix import CASES, GPU_SIZES
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import popsd_kernels.sweeps.single_read
from popsd import Head, HiddenStates
from popsd.engine import operator, sources
from popsd_kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PLAIN = [case for case in CASES if case.way == "plain"]
SWEEPS = {"row_statistics_kernel", "row_loss_gradient_kernel"}


def launched_kernels():
    """Every @triton.jit function that no other one calls, device functions aside: those are what the package launches."""
    jitted, called = set(), set()
    for path in Path(popsd_kernels.__path__[0]).rglob("*.py"):
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(x) for x in function.decorator_list
            ):
                if path.parent.name != "device":  # a target's is an argument, which nobody calls by its name
                    jitted.add(function.name)
                called |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return jitted - called


@pytest.fixture(scope="module")
def launches():
    """Case name -> names of the kernels that it launches."""
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        return {case.name: record(case, patch, GPU_SIZES[case.place]) for case in PLAIN}


def pretend(patch):
    """A GPU of 132 multiprocessors for which kernels are compiled."""
    patch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda *_: SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048),
    )
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for module in (launch, popsd_kernels.sweeps.single_read):
        patch.setattr(module, "INTERPRETED", False)
    patch.setattr(sources, "project", lambda hidden, weight, out, accumulate=False: None)  # a CPU has no 16-bit ones
    patch.setattr(torch.ops.popsd, "divergence", Operator.apply)
    patch.setattr(judge, "make_hidden", empty_hidden)
    patch.setattr(judge, "make_head", empty_head)


def record(case, patch, size):
    """Names of what it launches, but for sweep 1 of the sampled tokens' columns, which are rows of one entry."""
    names = set()

    def run(self, device):
        if self.arguments.get("V") != 1:
            names.add(self.kernel.fn.__name__)

    patch.setattr(launch.Launch, "run", run)
    with AsIfOnGpu():
        judge.execute(case, judge.make(case, size, "cuda"), "triton")
    return names


def never_launched(launches):
    return launched_kernels() - {name for names in launches.values() for name in names}


class GpuTensor(torch.Tensor):
    """A tensor on the meta device, which has a shape and no memory, that says to everyone but torch that it is on a GPU."""

    inside_torch = False

    @property
    def device(self):
        return torch.device("meta") if GpuTensor.inside_torch else torch.device("cuda", 0)

    def data_ptr(self):
        """A number of its own for each storage, too far from the next for two to overlap."""
        return (self.untyped_storage()._cdata << 48) + self.storage_offset() * self.element_size()


class AsIfOnGpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is made on the meta device."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.device:
            return function(*arguments, **options or {})
        options = {**(options or {})}
        if options.get("device") is not None and torch.device(options["device"]).type == "cuda":
            options["device"] = "meta"
        with torch._C.DisableTorchFunctionSubclass(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(GpuTensor, "inside_torch", True)
            return tree_map(disguised, function(*arguments, **options))


def disguised(value):
    return value.as_subclass(GpuTensor) if isinstance(value, torch.Tensor) and value.is_meta else value


def empty_hidden(tokens, width, spread, *, dtype, device):
    return HiddenStates(*(torch.empty(tokens, width, dtype=dtype, device=device) for _ in range(4)))


def empty_head(vocab, width, std, *, seed, dtype, device, bias):
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    return Head(weight, torch.empty(vocab, dtype=dtype, device=device) if bias else None)


class Operator(torch.autograd.Function):
    """`popsd::divergence` without the dispatcher, which would not run its body on fake tensors."""

    @staticmethod
    def forward(ctx, *arguments):
        output = operator._forward(*arguments)
        operator._setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, *upstream):
        with AsIfOnGpu(), pytest.MonkeyPatch.context() as patch:  # which the caller, Tensor.backward, has switched off
            patch.setattr(GpuTensor, "inside_torch", False)
            return operator._backward(ctx, *map(disguised, upstream))


def test_each_kernel_is_launched_by_some_case(launches):
    assert len(launched_kernels()) > 10
    assert never_launched(launches) == set()
    assert not {name for names in launches.values() for name in names} - launched_kernels()


def test_a_kernel_without_a_case_is_missed(launches):
    for kernel in launched_kernels():
        fewer = {case: names for case, names in launches.items() if kernel not in names}
        assert len(fewer) < len(launches) and kernel in never_launched(fewer)


def test_the_main_sweeps_run_wherever_they_should(launches):
    cases = [case for case in PLAIN if case.main_path]
    assert sum(case.dtype != torch.float32 for case in cases) > 80
    for case in cases:
        assert launches[case.name] >= SWEEPS and "row_single_read_kernel" not in launches[case.name], case.name
    for case in PLAIN:
        if case.place == "few" and case.strategy == "chunked":
            assert "row_split_kernel" in launches[case.name] and not launches[case.name] & SWEEPS, case.name


def test_with_too_few_tokens_they_would_not_run(monkeypatch):
    pretend(monkeypatch)
    case = next(case for case in PLAIN if case.main_path and case.dtype == torch.bfloat16)
    assert not record(case, monkeypatch, GPU_SIZES["main"]._replace(tokens=96)) & SWEEPS
