"""The operator: its registration, and torch.compile without a graph break in the caller."""

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig
from popsd.engine import losses
from popsd.testing import make_head, make_hidden, relative_l2

V, D, N = 53, 12, 10


def arguments(trainable: bool, reduction: str):
    hidden, head = make_hidden(N, D, 0.4), make_head(V, D, bias=True)
    student = hidden.student.clone().requires_grad_()
    weight = head.weight.clone().requires_grad_(trainable)
    bias = head.bias.clone().requires_grad_(trainable)
    return HiddenStates(student, *hidden[1:]), weight, bias, reduction


def step(hidden, weight, bias, reduction):
    head = Head(weight, bias, logit_scale=0.9)
    output = popsd.linear_purified_jsd(
        hidden, head, config=PurifiedConfig(beta=0.3), weights=torch.ones(N), reduction=reduction, impl="torch"
    )
    return (output.loss * 2.0).sum(), output.student_entropy.mean()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiles_as_one_graph_with_equal_gradients(trainable, reduction):
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight, bias, reduction = arguments(trainable, reduction)
        loss, entropy = function(hidden, weight, bias, reduction)
        loss.backward()
        results.append([loss, entropy, hidden.student.grad, *((weight.grad, bias.grad) if trainable else ())])
    for eager, compiled in zip(*results, strict=True):
        assert relative_l2(compiled, eager) < 1e-6


CALLS = {
    "jsd": lambda x: popsd.jsd(*x[:2]),
    "purified_jsd": lambda x: popsd.purified_jsd(*x, token_ids=torch.zeros(N, dtype=torch.long), telemetry=True),
    "purified_jsd, names": lambda x: popsd.purified_jsd(*x, impl="torch", decompose="logits"),
    "linear_jsd": lambda x: popsd.linear_jsd(x[0], Head(x[1]), x[2], strategy="chunked"),
    "linear_purified_jsd": lambda x: popsd.linear_purified_jsd(HiddenStates(*x), Head(x[3]), decompose="gram"),
    "linear_sparse_jsd": lambda x: popsd.linear_sparse_jsd(
        x[0], Head(x[1]), popsd.SparseTarget(torch.arange(3).expand(N, 3), x[2].log_softmax(-1)[:, :3])
    ),
    "registered target": lambda x: popsd.purified_jsd(*x, config=popsd.presets.arithmetic_mix(0.3), impl="torch"),
    "structure of a target": lambda x: popsd.linear_purified_jsd(
        HiddenStates(*x), Head(x[3]), config=popsd.presets.alpha_mix(0.3)
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_loss_is_traced_whole(call):
    """Validation included, with defaults as with names; torch 2.8 to 2.12 trace less than 2.13."""
    streams = [torch.randn(N, V) for _ in range(4)]
    traced = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(traced(streams).loss, call(streams).loss)


def test_logit_losses_compile_as_one_graph():
    streams = [torch.randn(N, V) for _ in range(4)]
    results = []
    for function in (popsd.purified_jsd, torch.compile(popsd.purified_jsd, fullgraph=True, backend="aot_eager")):
        leaf = streams[0].clone().requires_grad_()
        function(leaf, *streams[1:], impl="torch").loss.sum().backward()
        results.append(leaf.grad)
    assert relative_l2(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("trainable", [False, True])
def test_registration_is_sound(trainable, monkeypatch):
    """torch's own checks of schema, fake tensors and autograd registration, on the arguments a real call makes."""
    calls = []
    original = losses.divergence

    def spy(problem):
        calls.append((*problem.tensors, *problem.options))
        return original(problem)

    monkeypatch.setattr(losses, "divergence", spy)
    step(*arguments(trainable, "sum"))
    popsd.purified_jsd(*(torch.randn(N, V) for _ in range(4)), decompose=True)
    assert len(calls) == 2
    for call in calls:
        torch.library.opcheck(torch.ops.popsd.divergence.default, call)
