"""A coefficient per completion or token: the same as separate calls, to the bit."""

from dataclasses import replace

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, MaskConfig, PurifiedConfig, oracle
from popsd.engine.tokens import checks
from popsd.testing import make_head, make_hidden, relative_l2

B, T, V, D = 4, 5, 93, 16
BETA = torch.tensor([0.0, 1.0, 0.25, 1.0])


def streams(trainable=False):
    hidden = HiddenStates(*(x.view(B, T, D) for x in make_hidden(B * T, D, 0.4)))
    head = Head(make_head(V, D).weight.clone().requires_grad_(trainable))
    return hidden._replace(student=hidden.student.clone().requires_grad_()), head


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("trainable", [False, True])
def test_it_equals_a_call_for_each_number(reduction, trainable):
    """Loss, every other result and the gradient of the student; the head's is a sum in another order."""
    config, ids, weights = PurifiedConfig(), torch.arange(B * T).view(B, T), torch.rand(B, T)
    hidden, head = streams(trainable)
    found = popsd.linear_purified_jsd(
        hidden, head, config=config, beta=BETA, token_ids=ids, weights=weights, reduction=reduction, decompose=True
    )
    found.loss.sum().backward()
    apart, own = streams(trainable)
    for value in BETA.unique().tolist():
        rows = value == BETA
        expected = popsd.linear_purified_jsd(
            HiddenStates(*(x[rows] for x in apart)),
            own,
            config=replace(config, beta=value),
            token_ids=ids[rows],
            weights=weights[rows],
            reduction=reduction,
            decompose=True,
        )
        expected.loss.sum().backward()
        for name in ("divergence", "student_kl", "target_kl", "token_logprob", "target_logprob", "weights"):
            assert torch.equal(getattr(found, name)[rows], getattr(expected, name)), name
        for one, other in zip(found.decomposition, expected.decomposition, strict=True):
            assert torch.equal(one[rows], other)
    assert torch.equal(hidden.student.grad, apart.student.grad)
    if trainable:
        assert relative_l2(head.weight.grad, own.weight.grad) < 1e-6


def test_it_matches_the_oracle_from_logits_and_per_token():
    student, target = torch.randn(2, B, T, V)
    expected = oracle.jsd_of_rows(student, target, BETA, popsd.DivergenceConfig())
    assert relative_l2(popsd.jsd(student, target, beta=BETA).loss, expected) < 1e-5
    per_token = BETA[:, None].expand(B, T)
    assert torch.equal(popsd.jsd(student, target, beta=per_token).loss, popsd.jsd(student, target, beta=BETA).loss)
    flat = popsd.jsd(student.flatten(0, 1), target.flatten(0, 1), beta=per_token.flatten()).loss
    assert torch.equal(flat, popsd.jsd(student, target, beta=BETA).loss.flatten())


def test_masks_see_all_tokens_of_the_call():
    """A top share is of the whole call, not of the tokens of one coefficient."""
    hidden, head = streams()
    masks = MaskConfig(top_student_entropy=0.3)
    found = popsd.linear_purified_jsd(hidden, head, beta=BETA, masks=masks)
    assert torch.equal(found.weights, popsd.linear_purified_jsd(hidden, head, masks=masks).weights)


def test_the_module_drops_masked_tokens_and_keeps_each_coefficient():
    hidden, head = streams()
    mask = torch.arange(T) < torch.tensor([5, 2, 0, 3])[:, None]
    module = popsd.PurifiedOPSDLoss(PurifiedConfig())
    loss, _ = module(hidden, head, mask=mask, beta=BETA)
    expected = popsd.linear_purified_jsd(hidden, head, beta=BETA, weights=mask.float()).loss.sum() / mask.sum()
    assert relative_l2(loss, expected) < 1e-6


@pytest.mark.parametrize(
    ("beta", "error", "message"),
    [
        (torch.rand(B * T).view(B, T), ValueError, "beta: expected at most 8 different numbers.*got 20"),
        (torch.tensor([0.0, 1.0, 2.0, 1.0]), ValueError, r"beta: expected a number in \[0, 1\]; got 2.0"),
        (torch.tensor([0.0, 1.0, float("nan"), 1.0]), ValueError, r"beta: expected a number in \[0, 1\]; got nan"),
        (torch.zeros(T), ValueError, "beta: expected shape"),
        (torch.zeros(B, requires_grad=True), ValueError, "beta: expected a tensor without gradient"),
        (0.5, TypeError, "beta: expected a torch.Tensor"),
    ],
)
def test_bad_coefficients_are_refused(beta, error, message):
    hidden, head = streams()
    with pytest.raises(error, match=message):
        popsd.linear_purified_jsd(hidden, head, beta=beta)


def test_a_graph_cannot_read_them(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"beta: expected None under torch\.compile"):
        checks.checked_betas(BETA, (B, T), BETA.device, PurifiedConfig())
