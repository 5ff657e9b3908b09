"""Eq. 4 against the oracle, alone and beside the loss."""

import pytest
import torch
from accuracy import make_head, make_hidden, relative_l2

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, oracle


@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.5}, {"softcap": 6.0}])
@pytest.mark.parametrize("temperature", [1.0, 1.4])
@pytest.mark.parametrize("separate", [False, True])
def test_decompose_matches_the_oracle(head, temperature, separate):
    hidden, config = make_hidden(50, 24, 0.4), PurifiedConfig(temperature=temperature, vocab_size=190)
    student_head = Head(make_head(211, 24).weight, torch.randn(211), **head)
    frozen_head = make_head(211, 24, seed=8) if separate else None
    expected = oracle.decompose(
        oracle.head_logits(hidden.student, student_head),
        *(oracle.head_logits(x, frozen_head or student_head) for x in (hidden.teacher, hidden.reference)),
        config,
    )
    actual = popsd.decompose(hidden._replace(base=None), student_head, frozen_head, config=config, workspace_mib=0.1)
    beside = popsd.linear_purified_jsd(hidden, student_head, frozen_head, config=config, decompose=True)
    for name in expected._fields:
        assert relative_l2(getattr(actual, name), getattr(expected, name)) < 1e-4, name
        assert relative_l2(getattr(beside.decomposition, name), getattr(expected, name)) < 1e-4, name
    plain = popsd.linear_purified_jsd(hidden, student_head, frozen_head, config=config)
    assert relative_l2(beside.loss, plain.loss) < 1e-5  # the general path computes the same loss


def test_batched_and_from_logits():
    hidden, head = make_hidden(12, 8, 0.4), make_head(31, 8)
    flat = popsd.decompose(hidden, head)
    batched = popsd.decompose(HiddenStates(*(x.view(3, 4, 8) for x in hidden)), head)
    logits = [x @ head.weight.T for x in hidden]
    given = popsd.purified_jsd(*logits, decompose=True).decomposition
    for a, b, c in zip(flat, batched, given, strict=True):
        assert b.shape == (3, 4)
        torch.testing.assert_close(b.flatten(), a)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-5)


def test_identical_policies_decompose_into_zeros_not_nan():
    x = torch.randn(4, 8)
    parts = popsd.decompose(HiddenStates(x, x, x, x), make_head(31, 8))
    assert all((field == 0).all() for field in parts)
