"""What ``impl="triton"`` promises beyond the matrix of test_correctness.py; real kernels, in Triton's interpreter."""

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, oracle
from popsd.testing import make_head, make_hidden, relative_l2, true_jsd, true_purified

N, V, D = 5, 157, 24

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_each_token_is_accurate_where_one_entry_has_nearly_all_the_mass(beta):
    """Without Σ(p − q) taken out the forward gradient is off by 1e-3, forward and reverse losses by 3e-7 (of 2e-5 to 1e-2)."""
    hidden, head, config = make_hidden(100, 64, 0.01), make_head(2048, 64, 10.0), PurifiedConfig(beta=beta)
    everything = true_purified(hidden, (head, head), config, torch.ones(100)).loss
    top = oracle.head_logits(hidden.student, head).softmax(-1).amax(-1)
    few = (top > 0.97) & (everything > 2e-5) & (everything < 1e-2)
    hidden = HiddenStates(*(x[few] for x in hidden))
    count = int(few.sum())
    assert count > 10
    truth, leaf = (
        true_purified(hidden, (head, head), config, torch.ones(count)),
        hidden.student.clone().requires_grad_(),
    )
    output = popsd.linear_purified_jsd(hidden._replace(student=leaf), head, config=config, impl="triton")
    output.loss.sum().backward()
    errors = (leaf.grad.double() - truth.dhidden).norm(dim=-1) / truth.dhidden.norm(dim=-1)
    assert errors.max() < 5e-5
    assert (output.loss - truth.loss).abs().max() < 1e-7


@pytest.mark.parametrize("two", [False, True], ids=["purified", "two"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_float32_gradients_are_accurate_where_student_and_target_nearly_agree(beta, two):
    """The base travels as its difference to the student: 1e-5 where logits projected apart leave 2e-5 to 8e-5."""
    hidden, head = make_hidden(N, 64, 0.004), make_head(1003, 64, 10.0, bias=True)
    head, config, upstream = Head(head.weight, head.bias, 0.9), PurifiedConfig(beta=beta), torch.ones(N)
    leaf = hidden.student.clone().requires_grad_()
    if two:
        output = popsd.linear_jsd(leaf, head, hidden.teacher, config=config, impl="triton")
        truth = true_jsd(hidden.student, hidden.teacher, (head, head), config, upstream)
    else:
        output = popsd.linear_purified_jsd(hidden._replace(student=leaf), head, config=config, impl="triton")
        truth = true_purified(hidden, (head, head), config, upstream)
    output.loss.sum().backward()
    assert (output.loss.double() - truth.loss).abs().max() < 1e-6
    assert relative_l2(leaf.grad, truth.dhidden) < (3e-5 if beta == 0.0 else 1.5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_result_equals_the_torch_bodies(dtype):
    hidden, head = make_hidden(N, D, 0.4), make_head(V, D)
    logits = [(x @ head.weight.T).to(dtype).index_fill(1, torch.tensor([4, 9]), -torch.inf) for x in hidden]
    config, ids = PurifiedConfig(beta=0.3, token_clip=0.2), torch.tensor([3, 5, -1, 0, 150])
    results = {}
    for impl in ("torch", "triton"):
        leaf = logits[0].clone().requires_grad_()
        output = popsd.purified_jsd(leaf, *logits[1:], config=config, token_ids=ids, decompose=True, impl=impl)
        output.loss.sum().backward()
        fields = [x for x in output if isinstance(x, torch.Tensor)] + list(output.decomposition)
        results[impl] = [*fields, leaf.grad.float()]
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=2e-6, equal_nan=True
        )


def test_target_logits_and_no_tokens():
    logits = [torch.randn(3, 4, V) for _ in range(3)]
    torch.testing.assert_close(
        popsd.purified_target_logits(*logits, impl="triton"), popsd.purified_target_logits(*logits, impl="torch")
    )
    nothing = HiddenStates(*(torch.zeros(0, D) for _ in range(4)))
    leaf = nothing.student.requires_grad_()
    popsd.linear_purified_jsd(nothing, make_head(V, D), impl="triton").loss.sum().backward()
    assert leaf.grad.shape == (0, D)
