"""Where one policy can sample what the other cannot: a KL is inf, whatever the backend, and its gradient says so."""

import pytest
import torch

import popsd
from popsd import DivergenceConfig, Head, HiddenStates, PurifiedConfig, TargetConfig, oracle
from popsd.testing import make_head, make_hidden

FULL = torch.tensor([[0.0, 1.0, 0.5], [0.3, -1.0, 0.2], [0.0, 1.0, 0.5]])
CUT = torch.tensor([[0.0, 1.0, -torch.inf], [0.3, -1.0, 0.4], [0.0, 1.0, 0.5]])
IMPLS = ("torch", "triton")


def loss_and_gradient(student, call):
    leaf = student.clone().requires_grad_()
    output = call(leaf)
    output.loss.sum().backward()
    return output, leaf.grad


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rare", [0.5, -80.0], ids=["likely", "1e-35"])
def test_a_divergence_of_disjoint_supports_is_that_of_the_oracle(impl, beta, rare):
    """Times a floor of -1e30, a token of 1e-35 would have added 1e-5 to a loss that is infinite."""
    full = FULL.clone()
    full[0, 2] = rare
    config = DivergenceConfig(beta=beta)
    for student, target in ((CUT, full), (full, CUT)):
        output, gradient = loss_and_gradient(student, lambda x, t=target: popsd.jsd(x, t, config=config, impl=impl))
        expected = oracle.jsd(student, target, config)
        torch.testing.assert_close(output.loss.double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.isinf(expected[0]) == ((beta == 0.0) if student is CUT else (beta == 1.0))
        kl = output.student_kl if beta == 1.0 else output.target_kl
        assert torch.isinf(kl[0]) == torch.isinf(expected[0])
        p, q = student.softmax(-1), target.softmax(-1)
        if torch.isinf(expected[0]):
            wanted = (p - q)[0] if beta == 0.0 else torch.full((3,), torch.nan)
            torch.testing.assert_close(gradient[0], wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert torch.isfinite(gradient[1:]).all()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_clips_bound_it_as_they_say(impl, beta):
    student, target = (CUT, FULL) if beta == 0.0 else (FULL, CUT)
    config = DivergenceConfig(beta=beta, token_clip=0.2)
    output, gradient = loss_and_gradient(student, lambda x: popsd.jsd(x, target, config=config, impl=impl))
    assert output.loss[0] == torch.tensor(0.2) and output.token_clipped[0] == 1.0 and (gradient[0] == 0).all()
    config = DivergenceConfig(beta=beta, entry_clip=0.1)
    output, gradient = loss_and_gradient(student, lambda x: popsd.jsd(x, target, config=config, impl=impl))
    torch.testing.assert_close(output.loss.double(), oracle.jsd(student, target, config), rtol=1e-5, atol=1e-7)
    assert torch.isfinite(gradient).all()


def test_masked_tokens_and_masks_of_finite_logits_are_none():
    weights = torch.tensor([0.0, 1.0, 1.0])
    config = DivergenceConfig(beta=1.0)
    output, gradient = loss_and_gradient(FULL, lambda x: popsd.jsd(x, CUT, config=config, weights=weights))
    assert torch.isfinite(output.loss).all() and torch.isfinite(output.student_kl).all() and (gradient[0] == 0).all()
    far = CUT.clone()
    far[0, 2] = -65504.0  # as masks in float16 write it: a probability of 0 in any arithmetic
    output, _ = loss_and_gradient(CUT, lambda x: popsd.jsd(x, far, config=DivergenceConfig(beta=0.0)))
    assert output.loss[0] == 0.0


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_purified_target_can_sample_what_the_base_can(beta):
    config = PurifiedConfig(beta=beta)
    for base, teacher in ((CUT, FULL), (FULL, CUT)):
        output, _ = loss_and_gradient(FULL, lambda x, s=(base, teacher, FULL): popsd.purified_jsd(x, *s, config=config))
        expected = oracle.purified_jsd(FULL, base, teacher, FULL, config)
        assert torch.isinf(output.loss[0]) == torch.isinf(expected[0]) == (beta == 1.0 and base is CUT)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_heads_whose_biases_forbid_different_tokens(beta):
    hidden, head = make_hidden(5, 8, 0.3), make_head(23, 8)
    bias = torch.zeros(23)
    bias[4] = -torch.inf
    config = PurifiedConfig(beta=beta)
    for heads in ((Head(head.weight, bias), head), (head, Head(head.weight, bias))):
        output, gradient = loss_and_gradient(
            hidden.student,
            lambda x, h=heads: popsd.linear_purified_jsd(hidden._replace(student=x), *h, config=config),
        )
        logits = [oracle.head_logits(x, heads[i > 0]) for i, x in enumerate(hidden)]
        torch.testing.assert_close(output.loss.double(), oracle.purified_jsd(*logits, config), rtol=1e-4, atol=1e-6)
        assert torch.isfinite(gradient).all() == (beta != 1.0 or heads[1] is head)


def test_a_registered_target_may_forbid_tokens():
    popsd.register_target("first two, for supports", lambda base, *_: base.index_fill(1, torch.tensor([2]), -torch.inf))
    for beta, infinite in ((0.0, False), (1.0, True)):
        config = TargetConfig(target="first two, for supports", beta=beta)
        output, gradient = loss_and_gradient(FULL, lambda x, c=config: popsd.purified_jsd(x, *[FULL] * 3, config=c))
        assert torch.isinf(output.loss).all() == infinite and torch.isnan(gradient).all() == infinite
        hidden, head = make_hidden(4, 8, 0.3), make_head(3, 8)
        output = popsd.linear_purified_jsd(HiddenStates(*hidden), head, config=config)
        assert torch.isinf(output.loss).all() == infinite
