"""Plausibility and the tail cap inside the target, against the oracle, on every path that composes one."""

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, oracle
from popsd.testing import make_head, make_hidden, relative_l2, true_purified

V, D = 211, 24
MASKS = {
    "plausibility": {"plausibility": 0.02},
    "tail": {"tail_floor": 0.01, "tail_cap": 0.3},
    "both": {"plausibility": 0.02, "tail_floor": 0.01, "tail_cap": 0.3},
    "unclipped": {"plausibility": 0.02, "tail_floor": 0.01, "tail_cap": 0.3, "pmi_clip": None},
    "uncentred": {"plausibility": 0.02, "center": False, "pmi_clip": 1.0},
    "tempered": {"plausibility": 0.1, "tail_floor": 0.02, "tail_cap": 0.2, "temperature": 1.6, "vocab_size": 190},
}
HEADS = {"plain": {}, "scale": {"logit_scale": 0.6}, "softcap": {"softcap": 8.0}}


def run(hidden, head, config, **kwargs):
    leaf = hidden.student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(hidden._replace(student=leaf), head, config=config, **kwargs)
    output.loss.sum().backward()
    return output, leaf.grad


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_masked_targets_match_the_oracle(masks, kind, beta):
    hidden, config = make_hidden(60, D, 0.4), PurifiedConfig(beta=beta, **masks)
    head = Head(make_head(V, D).weight, torch.randn(V), **HEADS[kind])
    truth = true_purified(hidden, (head, head), config, torch.ones(60))
    output, gradient = run(hidden, head, config, impl="torch", workspace_mib=0.1)
    assert relative_l2(output.loss, truth.loss) < 1e-5
    assert relative_l2(gradient, truth.dhidden) < 2e-5
    plain = true_purified(hidden, (head, head), PurifiedConfig(beta=beta), torch.ones(60))
    assert relative_l2(truth.loss, plain.loss) > 1e-3, "a mask that changes nothing proves nothing"


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_triton_needs_no_option_for_them(masks, monkeypatch):
    """The masks edit the difference before the sweeps, so the kernels obey them as they are."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, head, config = make_hidden(5, D, 0.4), make_head(V, D), PurifiedConfig(**masks)
    results = {impl: run(hidden, head, config, impl=impl) for impl in ("torch", "triton")}
    torch.testing.assert_close(results["triton"][0].loss, results["torch"][0].loss, rtol=2e-5, atol=1e-7)
    assert relative_l2(results["triton"][1], results["torch"][1]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits_and_as_dense_target(dtype):
    head, config = make_head(V, D), PurifiedConfig(**MASKS["both"])
    logits = [(x @ head.weight.T).to(dtype) for x in make_hidden(9, D, 0.4)]
    for x in logits:
        x[:, 40:60] = -torch.inf
    expected = oracle.purified_jsd(*logits, config)
    assert relative_l2(popsd.purified_jsd(*logits, config=config).loss, expected) < 1e-5
    target = popsd.purified_target_logits(*logits[1:], config=config)
    exact = torch.softmax(oracle.purified_target_logits(*logits[1:], config), -1)
    assert relative_l2(torch.softmax(target, -1), exact) < 1e-5


def test_a_trained_head_recomputes_the_masked_target():
    hidden, head, config = make_hidden(12, D, 0.4), make_head(V, D), PurifiedConfig(**MASKS["both"])
    truth = true_purified(hidden, (head, head), config, torch.ones(12))
    trained = Head(head.weight.clone().requires_grad_())
    run(hidden, trained, config, impl="torch")
    assert relative_l2(trained.weight.grad, truth.dweight) < 2e-5


def test_plausibility_of_one_leaves_the_base():
    """Only the base's likeliest entry may move then, and Δ̃ of everything else is 0."""
    hidden, head = make_hidden(9, D, 0.4), make_head(V, D)
    logits = [x @ head.weight.T for x in hidden]
    target = popsd.purified_target_logits(*logits[1:], config=PurifiedConfig(plausibility=1.0))
    moved = (target - logits[1]).abs() > 1e-4
    assert (moved.sum(-1) <= 1).all() and (moved.nonzero()[:, 1] == logits[1].argmax(-1)[moved.any(-1)]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plausibility": 0.0}, r"plausibility: expected a number in \(0, 1\], or None; got 0.0"),
        ({"plausibility": 1.5}, r"plausibility: .*got 1.5"),
        ({"tail_floor": 0.1}, r"tail_cap: expected with tail_floor or not at all"),
        ({"tail_floor": 0.1, "tail_cap": -1.0}, r"tail_cap: expected a positive finite number"),
        ({"tail_floor": 0.1, "tail_cap": 10.0}, r"tail_cap: expected less than pmi_clip=10.0"),
        ({"tail_floor": 2.0, "tail_cap": 1.0}, r"tail_floor: expected a number in \(0, 1\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PurifiedConfig(**options)


def test_streaming_refuses_them(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden = HiddenStates(*(torch.randn(3, D) for _ in range(4)))
    with pytest.raises(ValueError, match=r"strategy: 'streaming' needs a configuration without plausibility"):
        popsd.linear_purified_jsd(
            hidden, make_head(V, D), config=PurifiedConfig(plausibility=0.1), impl="triton", strategy="streaming"
        )
