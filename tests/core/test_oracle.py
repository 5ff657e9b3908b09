"""The oracle against the equations written out once more by hand, finite differences, and the paper's own identities."""

import math

import pytest
import torch

from popsd import Head, PurifiedConfig, oracle

V = 7


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7}, {"entry_clip": 0.02}, {"token_clip": 0.5}, {"pmi_clip": None}, {"center": False}],
)
def test_gradcheck(beta, options):
    config = PurifiedConfig(beta=beta, **options)
    streams = [logits(i, 3, V) for i in range(4)]
    streams[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: oracle.purified_jsd(s, *streams[1:], config), streams[0])


def test_gradcheck_through_a_capped_head():
    weight, hidden = logits(0, V, 4).requires_grad_(), logits(1, 3, 4).requires_grad_()
    target, config = logits(2, 3, V), PurifiedConfig(beta=0.3)

    def loss(h, w):
        return oracle.jsd(oracle.head_logits(h, Head(w, logit_scale=0.7, softcap=2.0)), target, config)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_target_by_hand():
    base, teacher, reference = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 1.0], [2.0, 0.0], [0.0, 0.0]))
    log_t = [2 - math.log(math.e**2 + 1), -math.log(math.e**2 + 1)]
    log_r = [-math.log(2)] * 2
    delta = [t - r for t, r in zip(log_t, log_r, strict=True)]
    mean = sum(delta) / 2
    clipped = [3 * math.tanh((d - mean) / 3) for d in delta]
    expected = torch.log_softmax(torch.tensor([0 + clipped[0] / 2, 1 + clipped[1] / 2], dtype=torch.float64), -1)
    config = PurifiedConfig(pmi_clip=3.0, pmi_beta=2.0)
    actual = torch.log_softmax(oracle.purified_target_logits(base, teacher, reference, config), -1)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def test_target_maximises_the_regularised_reward():
    """Eq. 7-8: the unclipped PMI target is the maximiser over P of E_P[Δ_it] − β·KL(P‖P_0)."""
    base, teacher, reference = (logits(i, V) for i in range(3))
    config = PurifiedConfig(pmi_clip=None, pmi_beta=1.5)
    reward = torch.log_softmax(teacher, -1) - torch.log_softmax(reference, -1)
    log_base = torch.log_softmax(base, -1)

    def objective(log_p):
        p = log_p.exp()
        return (p * reward).sum() - config.pmi_beta * (p * (log_p - log_base)).sum()

    best = torch.log_softmax(oracle.purified_target_logits(base, teacher, reference, config), -1)
    for seed in range(20):
        other = torch.log_softmax(best + 0.1 * logits(seed, V), -1)
        assert objective(other) < objective(best)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_divergence_by_hand(beta):
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)

    def kl(a, b):
        return sum(float(x * (x / y).log()) for x, y in zip(a, b, strict=True))

    m = (1 - beta) * p + beta * q
    expected = kl(q, p) if beta == 0 else kl(p, q) if beta == 1 else beta * kl(q, m) + (1 - beta) * kl(p, m)
    assert oracle.jsd(p.log(), q.log(), PurifiedConfig(beta=beta)).item() == pytest.approx(expected, rel=1e-12)


def test_clips_cap_entries_and_tokens():
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    entries = q * (q.log() - p.log())
    capped = oracle.jsd(p.log(), q.log(), PurifiedConfig(beta=0.0, entry_clip=0.05))
    assert capped.item() == pytest.approx(float(entries.clamp(max=0.05).sum()), rel=1e-12)
    assert capped.item() < 0  # OPSD's clipped loss may be negative
    assert oracle.jsd(p.log(), q.log(), PurifiedConfig(beta=0.0, token_clip=0.2)).item() == pytest.approx(0.2)


def test_decomposition_adds_up():
    student, teacher, reference = (logits(i, 5, V) for i in range(3))
    parts = oracle.decompose(student, teacher, reference, PurifiedConfig())
    log = [torch.log_softmax(x, -1) for x in (student, teacher, reference)]
    torch.testing.assert_close(parts.total_norm, (log[1] - log[0]).norm(dim=-1))
    # ‖Δ_total‖² = <Δ_total, Δ_ref> + <Δ_total, Δ_it>
    share = parts.cos_total_reference * parts.reference_norm + parts.cos_total_transferable * parts.transferable_norm
    torch.testing.assert_close(share, parts.total_norm)
    torch.testing.assert_close(parts.reference_fraction, parts.reference_norm / parts.total_norm)


def test_impossible_tokens_contribute_nothing():
    """Entries of -inf in every stream equal a vocabulary without them."""
    streams = [logits(i, 2, V) for i in range(4)]
    padded = [torch.cat([x, torch.full((2, 3), -torch.inf, dtype=torch.float64)], -1) for x in streams]
    for beta in (0.0, 0.5, 1.0):
        config = PurifiedConfig(beta=beta)
        torch.testing.assert_close(oracle.purified_jsd(*padded, config), oracle.purified_jsd(*streams, config))
    uniform = torch.log_softmax(torch.zeros(4, dtype=torch.float64), -1)
    assert oracle.entropy(uniform).item() == pytest.approx(math.log(4))
