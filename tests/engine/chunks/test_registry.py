"""Registered targets: those of the presets against the oracle on every path, one's own, and what is refused."""

import doctest

import pytest
import torch
from kernel_helpers import interpreted

import triton.language as tl  # isort: skip

import popsd
from popsd import DivergenceConfig, Head, MaskConfig, PurifiedConfig, TargetConfig, oracle, presets
from popsd.engine.chunks import decomposition, registry
from popsd.testing import make_head, make_hidden, relative_l2

N, V, D, SHARE = 40, 211, 24, 0.3
HEADS = {"plain": {}, "scale": {"logit_scale": 0.6}, "softcap": {"softcap": 8.0}}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it; the interpreter for Triton."""
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
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


BUILT_IN = {
    "purified": ((2.0, 0.5), lambda b, t, r, config: oracle.purified_target_logits(b, t, r, config)),
    "opsd": ((), lambda b, t, r, config: oracle.log_probs(t, config)),
    "beta_opsd": ((2.0,), lambda b, t, r, config: oracle.alpha_mix(b, t, 0.5, config)),
    "contrastive_hints": ((2.0,), lambda b, t, r, config: oracle.purified_target_logits(b, t, r, config)),
    "arithmetic_mix": ((SHARE,), lambda b, t, r, config: oracle.arithmetic_mix(b, t, SHARE, config)),
    "alpha_mix": ((SHARE,), lambda b, t, r, config: oracle.alpha_mix(b, t, SHARE, config)),
}


def no_function(*_):
    raise AssertionError("called")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_structure_is_what_the_function_says(name, monkeypatch):
    """Every registered name: its function on the logits, and the structure that it names, are the oracle's target."""
    numbers, target = BUILT_IN[name]
    hidden, head, config = make_hidden(N, D, 0.4), make_head(V, D), TargetConfig(target=name, numbers=numbers, beta=0.3)
    streams = [oracle.head_logits(x, head) for x in hidden]
    pmi_beta, pmi_clip = (*numbers, 1.0)[0], 0.5 if name == "purified" else None
    log_q = target(*streams[1:], PurifiedConfig(pmi_beta=pmi_beta, pmi_clip=pmi_clip)).log_softmax(-1)
    expected = oracle.divergence(oracle.log_probs(streams[0], config), log_q, config)
    function = popsd.linear_purified_jsd(hidden, head, config=config, decompose=True)  # so the streams must stay
    assert relative_l2(function.loss, expected) < 1e-5
    assert relative_l2(popsd.purified_jsd(*(x.float() for x in streams), config=config).loss, expected) < 1e-5
    monkeypatch.setattr("popsd.engine.chunks.target.registered_logits", no_function)
    if name == "arithmetic_mix":  # has no structure
        with pytest.raises(AssertionError, match="called"):
            popsd.linear_purified_jsd(hidden, head, config=config)
    else:
        assert relative_l2(popsd.linear_purified_jsd(hidden, head, config=config).loss, expected) < 1e-5


@pytest.mark.parametrize("alpha", [SHARE, 1.0])
def test_the_alpha_mix_from_logits_with_impossible_tokens(alpha):
    """A token that is impossible to one of the two is impossible in the mix, unless the other counts alone."""
    head, config = make_head(V, D), presets.alpha_mix(alpha)
    logits = [x @ head.weight.T for x in make_hidden(N, D, 0.4)]
    logits[1][:, 40:60] = -torch.inf
    logits[2][:, 50:70] = -torch.inf
    expected = oracle.alpha_mix(logits[1], logits[2], alpha, config).softmax(-1)
    assert relative_l2(popsd.purified_target_logits(*logits[1:], config=config).softmax(-1), expected) < 1e-5
    assert (expected[:, 50:70] == 0).all() and (expected[:, 40:50] == 0).all() == (alpha < 1.0)


def test_triton_calls_the_device_function_and_torch_the_function(monkeypatch):
    hidden, head, config = make_hidden(3, D, 0.4), make_head(V, D), presets.arithmetic_mix(SHARE)
    by_function = popsd.linear_purified_jsd(hidden, head, config=config, impl="torch").loss
    monkeypatch.setattr("popsd.engine.chunks.target.registered_logits", no_function)
    by_device = popsd.linear_purified_jsd(hidden, head, config=config, impl="triton").loss
    assert relative_l2(by_device, by_function) < 1e-5
    with pytest.raises(AssertionError, match="called"):
        popsd.linear_purified_jsd(hidden, head, config=config, impl="torch")


@interpreted
def device_own(base, teacher, reference, strength, share):
    return base + strength * (teacher - reference) - share * tl.exp(reference)


def test_a_device_function_of_ones_own_equals_the_torch_function():
    """All three streams and two numbers: loss, gradient, dense logits."""

    def own(base, teacher, reference, strength, share):
        return base + strength * (teacher - reference) - share * reference.exp()

    popsd.register_target("mine", own, device_own)
    config, found = TargetConfig(target="mine", numbers=(0.7, 3.0), temperature=1.2), {}
    hidden, head, ids = make_hidden(5, D, 0.4), make_head(V, D), torch.tensor([0, V - 1, 3, 5, -1])
    for impl in ("torch", "triton"):
        logits = [x @ head.weight.T for x in hidden]
        leaf = logits[0].requires_grad_()
        output = popsd.purified_jsd(*logits, config=config, impl=impl, token_ids=ids)
        loss, likely = output.loss, output.target_logprob
        loss.sum().backward()
        dense = popsd.purified_target_logits(*logits[1:], config=config, impl=impl)
        found[impl] = (loss, leaf.grad, dense.softmax(-1), likely[:4])
        assert likely[4].isnan()
    for one, other in zip(*found.values(), strict=True):
        assert relative_l2(one, other) < 1e-5
    log_p, *frozen = (oracle.log_probs(x, config) for x in logits)
    log_q = own(*frozen, 0.7, 3.0).log_softmax(-1)
    assert relative_l2(loss, oracle.divergence(log_p, log_q, config)) < 1e-5
    assert relative_l2(likely[:4], oracle.sampled(log_q, ids)[:4]) < 1e-5


def test_a_device_function_that_is_not_decorated_as_the_kernels_are(monkeypatch):
    class Compiled:
        fn = None

    popsd.register_target("mine", lambda base, teacher, reference: teacher, Compiled())
    with pytest.raises(
        TypeError, match=r"function must be decorated with triton.jit .*TRITON_INTERPRET=1, got Compiled"
    ):
        call(config=TargetConfig(target="mine"), impl="triton")


def test_what_a_function_does_not_read_is_none():
    seen = []
    popsd.register_target("mine", lambda *x: seen.append(x[2]) or x[1], contexts=("base", "teacher"))
    call(config=TargetConfig(target="mine"))
    assert seen == [None]


def test_the_example_runs():
    found = doctest.testmod(registry)
    assert found.attempted > 4 and found.failed == 0


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
        (lambda b, t, r: t - torch.inf, ValueError, r"target 'bad': .*possible token in every row; got -inf"),
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
            r"config.target: expected one of \['alpha_mix', 'arithmetic_mix', .*got 'none'. Register it",
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
        (lambda: popsd.register_target("x", lambda b, t, r, p="x": b), TypeError, r"function: .*defaults are numbers"),
        (lambda: popsd.register_target("x", lambda b, t: b), TypeError, r"function: .*base, teacher, reference"),
        (lambda: popsd.register_target("a:b", max), TypeError, r"name: expected a non-empty string without ':'"),
        (lambda: popsd.register_target("x", max, max), TypeError, r"device_function: expected .*triton.jit"),
        (lambda: popsd.register_target("x", max, contexts=("base",)), ValueError, r"contexts: expected one of"),
        (lambda: popsd.register_target("x", max, contexts=("teacher",)), ValueError, r"contexts: expected base and"),
        (
            lambda: call(config=TargetConfig(target="arithmetic_mix")),
            ValueError,
            r"target 'arithmetic_mix': expected its numbers \(share\); got \(\)",
        ),
        (
            lambda: call(config=TargetConfig(target="purified", numbers=(1, 2, 3))),
            ValueError,
            r"target 'purified': expected its numbers \(pmi_beta=1, pmi_clip=10\); got \(1.0, 2.0, 3.0\)",
        ),
        (lambda: presets.alpha_mix(0.0), ValueError, r"alpha: expected a number in \(0, 1\]; got 0.0"),
        (
            lambda: popsd.purified_jsd(*torch.ones(4, 2, 3), config=TargetConfig(target="alpha_mix", numbers=(2.0,))),
            ValueError,
            r"alpha: expected a number",
        ),
    ],
)
def test_wrong_uses_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_the_oracles_mix_has_right_gradients():
    logits = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    config = DivergenceConfig(temperature=1.3)
    for mix in (oracle.arithmetic_mix, oracle.alpha_mix):
        assert torch.autograd.gradcheck(lambda *streams, mix=mix: mix(*streams, SHARE, config), logits)
