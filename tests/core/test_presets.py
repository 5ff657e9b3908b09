"""Each method of the family against its formula in the float64 oracle, and what a mix costs."""

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, oracle, presets
from popsd.testing import make_head, make_hidden, relative_l2

N, V, D = 40, 157, 24
HEAD = Head(make_head(V, D).weight, torch.randn(V, generator=torch.Generator().manual_seed(3)), logit_scale=0.8)
HIDDEN = make_hidden(N, D, 0.4)


def log_probs(name: str, temperature: float = 1.0) -> torch.Tensor:
    return torch.log_softmax(oracle.head_logits(getattr(HIDDEN, name), HEAD) / temperature, -1)


def expected_loss(target_logits: torch.Tensor, config: popsd.DivergenceConfig) -> torch.Tensor:
    return oracle.divergence(log_probs("student", config.temperature), torch.log_softmax(target_logits, -1), config)


def test_opsd():
    config = presets.opsd()
    assert (config.beta, config.entry_clip, config.temperature) == (0.5, 0.05, 1.1)
    loss = popsd.linear_jsd(HIDDEN.student, HEAD, HIDDEN.teacher, config=config).loss
    assert relative_l2(loss, expected_loss(log_probs("teacher", 1.1), config)) < 1e-5
    assert presets.opsd(beta=0.0).beta == 0.0


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_beta_opsd(strength):
    config = presets.beta_opsd(strength, beta=0.3)
    target = (1 - 1 / strength) * log_probs("base") + log_probs("teacher") / strength
    loss = popsd.linear_purified_jsd(HIDDEN._replace(reference=HIDDEN.base), HEAD, config=config).loss
    assert relative_l2(loss, expected_loss(target, config)) < 1e-5
    mix = presets.geometric_mix((HIDDEN.base, HIDDEN.teacher), (1 - 1 / strength, 1 / strength), HEAD)
    assert relative_l2(popsd.linear_jsd(HIDDEN.student, HEAD, mix, config=config).loss, loss) < 1e-5


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_contrastive_hints(strength):
    config = presets.contrastive_hints(strength)
    target = log_probs("base") + (log_probs("teacher") - log_probs("reference")) / strength
    loss = popsd.linear_purified_jsd(HIDDEN, HEAD, config=config).loss
    assert relative_l2(loss, expected_loss(target, config)) < 1e-5


def test_return_to_go_sums_what_is_left_of_each_completion():
    hidden = HiddenStates(*(x.view(4, 10, D) for x in HIDDEN._replace(reference=HIDDEN.base)))
    config, ids = presets.beta_opsd(2.0), torch.arange(40).view(4, 10)
    mask = torch.arange(10) < torch.tensor([10, 7, 1, 0])[:, None]
    output = popsd.linear_purified_jsd(hidden, HEAD, config=config, token_ids=ids.masked_fill(~mask, -1))
    found = presets.return_to_go(output, mask)
    log_q = torch.log_softmax(0.5 * log_probs("base") + 0.5 * log_probs("teacher"), -1)
    student, target = (oracle.sampled(x.view(4, 10, V), ids) for x in (log_probs("student"), log_q))
    for row, length in enumerate(mask.sum(1)):
        expected = oracle.return_to_go(student[row, :length], target[row, :length]) if length else torch.zeros(0)
        assert torch.allclose(found[row, :length].double(), expected.double(), atol=1e-5)
        assert not found[row, length:].any()
    with pytest.raises(ValueError, match="token_ids"):
        presets.return_to_go(output._replace(token_logprob=None), mask)
    with pytest.raises(ValueError, match=r"shape \[B, T\]"):
        presets.return_to_go(output, mask[:2])
    with pytest.raises(ValueError, match="id -1"):
        presets.return_to_go(output, torch.ones_like(mask))


def test_a_mix_with_a_power_per_token():
    alpha = torch.rand(N)
    mix = presets.geometric_mix((HIDDEN.teacher, HIDDEN.student), (1 - alpha, alpha), HEAD)
    target = (1 - alpha)[:, None] * log_probs("teacher") + alpha[:, None] * log_probs("student")
    config = popsd.DivergenceConfig(beta=0.0)
    loss = popsd.linear_jsd(HIDDEN.student, HEAD, mix, config=config).loss
    assert relative_l2(loss, expected_loss(target, config)) < 1e-5


def test_without_a_tanh_the_purified_target_is_one_stream(monkeypatch):
    """Two products forward instead of three, unless a diagnostic or a mask needs the parts."""
    from popsd.engine import sources

    rows, original = [], sources.project
    monkeypatch.setattr(
        sources, "project", lambda hidden, *a, **k: rows.append(hidden.shape[0]) or original(hidden, *a, **k)
    )
    cases = (
        ({"pmi_clip": None}, {}, 2),
        ({"pmi_clip": None, "center": False}, {}, 2),
        ({}, {}, 3),
        ({"pmi_clip": None, "plausibility": 0.1}, {}, 3),
        ({"pmi_clip": None}, {"telemetry": True}, 4),
    )
    for options, wanted, count in cases:
        rows.clear()
        config = PurifiedConfig(**options)
        loss = popsd.linear_purified_jsd(HIDDEN, HEAD, config=config, impl="torch", **wanted).loss
        assert rows == [count * N]
        logits = [oracle.head_logits(x, HEAD) for x in HIDDEN]
        assert relative_l2(loss, oracle.purified_jsd(*logits, config)) < 1e-5


def test_position_weights_increase_to_one():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    expected = [[0.2, 0.4, 0.6, 0.8, 1.0], [0.2, 0.6, 1.0, 0, 0], [0, 1.0, 0, 0, 0], [0] * 5]
    torch.testing.assert_close(presets.position_weights(mask, first=0.2), torch.tensor(expected))
    torch.testing.assert_close(
        presets.position_weights(mask, power=2.0)[0], torch.tensor([0.0, 0.0625, 0.25, 0.5625, 1.0])
    )
    hidden = HiddenStates(*(x[:20].view(4, 5, D) for x in HIDDEN))
    weights = presets.position_weights(mask, first=0.2)
    loss = popsd.linear_purified_jsd(hidden, HEAD, weights=weights).loss
    torch.testing.assert_close(loss, popsd.linear_purified_jsd(hidden, HEAD).loss * weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: presets.geometric_mix((HIDDEN.base,), (0.5, 0.5), HEAD), r"powers: expected one per stream"),
        (lambda: presets.geometric_mix((HIDDEN.base,), (0.5,), HEAD), r"powers: expected numbers that sum to 1"),
        (
            lambda: presets.geometric_mix((HIDDEN.base, HIDDEN.teacher[1:]), (0.5, 0.5), HEAD),
            r"streams: expected equal",
        ),
        (lambda: presets.geometric_mix((HIDDEN.base,), (1.0,), Head(HEAD.weight, softcap=5.0)), r"head: .*soft cap"),
        (lambda: presets.position_weights(torch.ones(3)), r"mask: expected shape \[B, T\]"),
        (lambda: presets.position_weights(torch.ones(3, 2), first=2.0), r"first: expected a weight"),
        (lambda: presets.position_weights(torch.ones(3, 2), power=0.0), r"power: expected a positive"),
        (lambda: presets.beta_opsd(0.0), r"pmi_beta: expected a positive finite number"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
