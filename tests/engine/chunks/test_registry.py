"""Targets of one's own: the arithmetic mix against the oracle on every path, and what is refused."""

import pytest
import torch

import popsd
from popsd import DivergenceConfig, Head, MaskConfig, PurifiedConfig, TargetConfig, oracle, presets
from popsd.engine.chunks import decomposition, registry
from popsd.testing import make_head, make_hidden, relative_l2

N, V, D, SHARE = 40, 211, 24, 0.3
HEADS = {"plain": {}, "scale": {"logit_scale": 0.6}, "softcap": {"softcap": 8.0}}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it; the interpreter for Triton."""
    monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)


def truth(hidden, heads, config):
    """Loss, and gradients of hidden states and head, in float64."""
    student = hidden.student.double().requires_grad_()
    weight = heads[0].weight.detach().double().requires_grad_()
    own = Head(weight, heads[0].bias, heads[0].logit_scale, heads[0].softcap)
    with torch.no_grad():
        base, teacher = (oracle.head_logits(x, heads[1]) for x in (hidden.base, hidden.teacher))
    log_p = oracle.log_probs(oracle.head_logits(student, own), config)
    loss = oracle.divergence(log_p, oracle.arithmetic_mix(base, teacher, SHARE, config), config)
    loss.sum().backward()
    return loss.detach(), student.grad, weight.grad


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("options", [{}, {"beta": 0.0, "temperature": 1.3, "vocab_size": 190}, {"beta": 0.7}], ids=str)
@pytest.mark.parametrize("two_heads", [False, True])
def test_the_arithmetic_mix_matches_the_oracle(impl, kind, options, two_heads):
    tokens = 3 if impl == "triton" else N
    hidden, config = make_hidden(tokens, D, 0.4), presets.arithmetic_mix(SHARE, **options)
    own = Head(make_head(V, D).weight.clone().requires_grad_(), torch.randn(V), **HEADS[kind])
    frozen = Head(make_head(V, D, seed=8).weight, torch.randn(V), **HEADS[kind]) if two_heads else None
    loss, dhidden, dweight = truth(hidden, (own, frozen or own), config)
    leaf = hidden.student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(
        hidden._replace(student=leaf), own, frozen, config=config, impl=impl, workspace_mib=0.1
    )
    output.loss.sum().backward()
    assert relative_l2(output.loss, loss) < 2e-5 and relative_l2(leaf.grad, dhidden) < 2e-5
    assert relative_l2(own.weight.grad, dweight) < 2e-5
    purified = popsd.linear_purified_jsd(hidden, own, frozen, config=PurifiedConfig(**options), impl="torch")
    assert relative_l2(purified.loss, loss) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits_with_impossible_tokens(dtype):
    head, config = make_head(V, D), presets.arithmetic_mix(SHARE)
    logits = [(x @ head.weight.T).to(dtype) for x in make_hidden(N, D, 0.4)]
    for x in logits:
        x[:, 40:60] = -torch.inf
    target = oracle.arithmetic_mix(logits[1], logits[2], SHARE, config)
    leaf = logits[0].clone().requires_grad_()
    output = popsd.purified_jsd(leaf, *logits[1:], config=config, decompose=True)
    output.loss.sum().backward()
    assert relative_l2(output.loss, oracle.divergence(oracle.log_probs(logits[0], config), target, config)) < 1e-5
    assert leaf.grad.isfinite().all() and output.decomposition is not None
    dense = popsd.purified_target_logits(*logits[1:], config=config)
    assert relative_l2(torch.softmax(dense, -1), target.exp()) < 1e-5


def test_the_ends_of_the_mix_are_base_and_teacher():
    hidden, head = make_hidden(N, D, 0.4), make_head(V, D)
    for share, stream in ((0.0, hidden.base), (1.0, hidden.teacher)):
        mixed = popsd.linear_purified_jsd(hidden, head, config=presets.arithmetic_mix(share)).loss
        assert relative_l2(mixed, popsd.linear_jsd(hidden.student, head, stream).loss) < 1e-5


def test_the_purified_target_as_a_registered_one():
    """All three logits and several numbers arrive, in this order, a few tokens at a time."""
    seen = []

    def purified(base, teacher, reference, beta, clip):
        seen.append(base.shape[0])
        delta = teacher.log_softmax(1) - reference.log_softmax(1)
        return base + clip * torch.tanh((delta - delta.mean(1, keepdim=True)) / clip) / beta

    popsd.register_target("mine", purified)
    hidden, head = make_hidden(N, D, 0.4), make_head(V, D)
    config = TargetConfig(target="mine", numbers=(2, 0.5), temperature=1.2)
    masks = MaskConfig(min_student_entropy=1.0, max_reference_fraction=1.5)
    found = popsd.linear_purified_jsd(hidden, head, config=config, masks=masks)
    expected = popsd.linear_purified_jsd(
        hidden, head, config=PurifiedConfig(pmi_beta=2.0, pmi_clip=0.5, temperature=1.2), masks=masks
    )
    assert relative_l2(found.loss, expected.loss) < 1e-5 and sum(seen) == N
    loss, _ = popsd.PurifiedOPSDLoss(config, masks=masks)(hidden, head)
    assert relative_l2(loss, found.loss.mean()) < 1e-6


def test_a_target_sees_a_few_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(registry, "DIAGNOSTIC_ELEMENTS", 3 * V)
    hidden, head, seen = make_hidden(8, D, 0.4), make_head(V, D), []
    popsd.register_target("teacher", lambda base, teacher, reference: seen.append(base.shape) or teacher)
    loss = popsd.linear_purified_jsd(hidden, head, config=TargetConfig(target="teacher")).loss
    assert seen == [(3, V), (3, V), (2, V)] and decomposition.DIAGNOSTIC_ELEMENTS > V
    assert relative_l2(loss, popsd.linear_jsd(hidden.student, head, hidden.teacher).loss) < 1e-5


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda b, t, r: t.double(), TypeError, r"target 'bad': .*return float32; got torch.float64. Convert it"),
        (lambda b, t, r: t[:, 1:], ValueError, r"target 'bad': .*return shape \[8, 211\] on cpu.*got \[8, 210\]"),
        (lambda b, t, r: None, TypeError, r"target 'bad': .*return a torch.Tensor; got NoneType"),
        (lambda b, t, r: t / 0.0 * 0.0, ValueError, r"target 'bad': .*return logits; got NaN or \+inf"),
    ],
)
def test_what_a_function_may_not_return(function, error, message):
    popsd.register_target("bad", function)
    with pytest.raises(error, match=message):
        popsd.linear_purified_jsd(make_hidden(8, D, 0.4), make_head(V, D), config=TargetConfig(target="bad"))


def call(**options):
    return popsd.linear_purified_jsd(make_hidden(8, D, 0.4), make_head(V, D), **options)


MIX = presets.arithmetic_mix(SHARE)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda: call(config=TargetConfig(target="none")),
            ValueError,
            r"config.target: expected one of \['arithmetic_mix'\]",
        ),
        (lambda: call(config=MIX, telemetry=True), ValueError, r"telemetry: expected False with the registered target"),
        (
            lambda: call(config=MIX, impl="triton", strategy="streaming"),
            ValueError,
            r"strategy: .*no registered target",
        ),
        (lambda: popsd.jsd(torch.ones(2, 3), torch.ones(2, 3), config=MIX), TypeError, r"config: .*got TargetConfig"),
        (lambda: popsd.PurifiedOPSDLoss(MIX, loss_target="opsd"), TypeError, r"config: .*got TargetConfig"),
        (lambda: call(config=DivergenceConfig()), TypeError, r"config: expected a popsd.PurifiedConfig"),
        (lambda: TargetConfig(target="x", numbers=(float("nan"),)), ValueError, r"numbers: expected finite numbers"),
        (lambda: presets.arithmetic_mix(1.5), ValueError, r"share: expected a number in \[0, 1\]; got 1.5"),
        (lambda: presets.arithmetic_mix(0.5, pmi_clip=1.0), TypeError, r"unexpected keyword argument 'pmi_clip'"),
        (lambda: popsd.register_target("arithmetic_mix", max), ValueError, r"name: expected one that is not taken"),
        (lambda: popsd.register_target("", max), TypeError, r"name: expected a non-empty string"),
        (lambda: popsd.register_target("x", None), TypeError, r"function: expected a function"),
    ],
)
def test_wrong_uses_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_the_oracles_mix_has_right_gradients():
    logits = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    config = DivergenceConfig(temperature=1.3)
    assert torch.autograd.gradcheck(lambda base, teacher: oracle.arithmetic_mix(base, teacher, SHARE, config), logits)
