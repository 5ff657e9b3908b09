"""The losses against the float64 oracle: every option, dtype and path, and what they promise about memory and gradients."""

import itertools

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, oracle
from popsd.testing import make_head, make_hidden, relative_l2, true_purified

V, D = 211, 24
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.6},
    "softcap": {"softcap": 8.0},
    "all": {"bias": True, "logit_scale": 1.4, "softcap": 12.0},
}
OPTIONS = {
    "default": {},
    "temperature": {"temperature": 1.6},
    "entry_clip": {"entry_clip": 0.01},
    "token_clip": {"token_clip": None},
    "no_clip": {"pmi_clip": None},
    "tight_clip": {"pmi_clip": 0.5},
    "pmi_beta": {"pmi_beta": 2.5},
    "uncentred": {"center": False, "pmi_clip": 1.0},
    "vocab_size": {"vocab_size": 190},
}


def head_of(kind: str, **kwargs) -> Head:
    options = dict(HEADS[kind])
    head = make_head(V, D, bias=options.pop("bias", False), **kwargs)
    return Head(head.weight, head.bias, **options)


def run(hidden, student_head, frozen_head, config, upstream, **kwargs):
    student = hidden.student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(
        hidden._replace(student=student), student_head, frozen_head, config=config, impl="torch", **kwargs
    )
    (output.loss * upstream).sum().backward()
    return output, student.grad


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_float32_matches_the_oracle(beta, options, kind):
    hidden, head = make_hidden(130, D, 0.4), head_of(kind)
    config, upstream = PurifiedConfig(beta=beta, **options), torch.rand(130) + 0.5
    if "token_clip" in options:  # half of the tokens
        loss = true_purified(hidden, (head, head), PurifiedConfig(beta=beta), upstream).loss
        config = PurifiedConfig(beta=beta, token_clip=float(loss.quantile(0.5)))
    truth = true_purified(hidden, (head, head), config, upstream)
    output, dhidden = run(hidden, head, None, config, upstream, workspace_mib=0.1)  # several chunks
    assert relative_l2(output.loss, truth.loss) < 1e-5
    assert relative_l2(dhidden, truth.dhidden) < 2e-5
    if "entry_clip" in options:
        assert (output.clip_fraction > 0).any()
    if "token_clip" in options:
        assert 0 < output.token_clipped.sum() < 130


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("student_width", [D, 17])
def test_trainable_and_separate_heads(tokens, beta, reduction, student_width):
    """A trained head beside a frozen one, also of another width; dW and the bias gradient, with recomputation and without."""
    hidden = make_hidden(tokens, D, 0.4)
    student = make_hidden(tokens, student_width, 0.4).student
    hidden = hidden._replace(student=student)
    frozen = make_head(V, D, seed=5, bias=True)
    own = make_head(V, student_width, seed=6, bias=True)
    trained = Head(own.weight.requires_grad_(), own.bias.requires_grad_(), logit_scale=0.8)
    config = PurifiedConfig(beta=beta)
    upstream = torch.ones(()) * 1.7 if reduction == "sum" else torch.rand(tokens) + 0.5
    truth = true_purified(hidden, (trained, frozen), config, upstream)
    _, dhidden = run(hidden, trained, frozen, config, upstream, reduction=reduction, workspace_mib=0.1)
    assert relative_l2(dhidden, truth.dhidden) < 2e-5
    assert trained.weight.grad.dtype == torch.float32
    assert relative_l2(trained.weight.grad, truth.dweight) < 2e-5
    assert relative_l2(trained.bias.grad, truth.dbias) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.012, 0.12, 0.45], ids=["kl_1e-3", "kl_1e-1", "kl_1"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_sixteen_bit_gradients_are_accurate_at_every_distance(dtype, spread, beta):
    """bf16-stored logits would be 5-40 % off here; logits stay in float32."""
    hidden, head = make_hidden(130, 64, spread, dtype=dtype), make_head(1003, 64, dtype=dtype)
    config, upstream = PurifiedConfig(beta=beta), torch.ones(130)
    truth = true_purified(hidden, (head, head), config, upstream)
    forward_kl = oracle.purified_jsd(*(oracle.head_logits(x, head) for x in hidden), PurifiedConfig(beta=0.0)).mean()
    assert 0.3 < forward_kl / {0.012: 1e-3, 0.12: 1e-1, 0.45: 1.0}[spread] < 3.0
    output, dhidden = run(hidden, head, None, config, upstream)
    assert dhidden.dtype == dtype
    assert relative_l2(dhidden, truth.dhidden) < 6e-3
    error = (output.loss.double() - truth.loss).abs()
    assert (error <= 2e-3 * truth.loss.abs() + 1e-6).all()


@pytest.mark.parametrize(("std", "spread"), [(3.0, 0.008), (10.0, 0.004), (30.0, 0.0025)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"pmi_clip": None}, {"temperature": 0.7, "pmi_beta": 2.0}], ids=str)
def test_float32_is_accurate_where_student_and_target_nearly_agree(std, spread, beta, options):
    """Projected apart, student and base would round at the size of their logits: 2e-5, 6e-5 and 9e-5 at these deviations."""
    hidden, head = make_hidden(130, 64, spread), make_head(1003, 64, std, bias=True)
    logits = [oracle.head_logits(x, head) for x in hidden]
    assert 4e-4 < oracle.purified_jsd(*logits, PurifiedConfig(beta=0.0)).mean() < 2e-3
    config, upstream = PurifiedConfig(beta=beta, **options), torch.ones(130)
    truth = true_purified(hidden, (head, head), config, upstream)
    output, dhidden = run(hidden, head, None, config, upstream)
    assert relative_l2(output.loss, truth.loss) < 2e-5
    assert relative_l2(dhidden, truth.dhidden) < 2e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_each_token_is_accurate_where_one_entry_has_nearly_all_the_mass(beta):
    """The gradient is then made of the other entries, and a normaliser rounded at 1e-7 is much beside them."""
    hidden, head, config = make_hidden(200, 64, 0.01), make_head(4096, 64, 10.0), PurifiedConfig(beta=beta)
    truth = true_purified(hidden, (head, head), config, torch.ones(200))
    top = oracle.head_logits(hidden.student, head).softmax(-1).amax(-1)
    few = (top > 0.97) & (truth.loss > 2e-5) & (truth.loss < 1e-2)
    assert few.sum() > 20
    output, dhidden = run(hidden, head, None, config, torch.ones(200))
    errors = (dhidden.double() - truth.dhidden).norm(dim=-1) / truth.dhidden.norm(dim=-1)
    assert errors[few].max() < 5e-5
    assert ((output.loss - truth.loss).abs() / truth.loss)[few].max() < 5e-5


def test_telemetry_matches_the_oracle():
    hidden, head, config = make_hidden(40, D, 0.4), head_of("plain"), PurifiedConfig(beta=0.3, temperature=1.2)
    ids = torch.arange(40) * 5
    ids[3] = -1
    output = popsd.linear_purified_jsd(hidden, head, config=config, token_ids=ids, impl="torch")
    logits = [oracle.head_logits(x, head) for x in hidden]
    log_p = oracle.log_probs(logits[0], config)
    log_q = torch.log_softmax(oracle.purified_target_logits(*logits[1:], config), -1)
    log_m = torch.logaddexp(log_p + torch.log(torch.tensor(0.7)), log_q + torch.log(torch.tensor(0.3)))
    expected = {
        "student_entropy": oracle.entropy(log_p),
        "target_entropy": oracle.entropy(log_q),
        "student_kl": (log_p.exp() * (log_p - log_m)).sum(-1),
        "target_kl": (log_q.exp() * (log_q - log_m)).sum(-1),
        "argmax_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
    }
    for name, value in expected.items():
        assert relative_l2(getattr(output, name), value) < 1e-5, name
    chosen = log_p.gather(1, ids.clamp_min(0)[:, None])[:, 0]
    keep = ids >= 0
    assert relative_l2(output.token_logprob[keep], chosen[keep]) < 1e-5
    assert torch.isnan(output.token_logprob[3])
    assert not any(x.requires_grad for x in output if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_linear_jsd(beta):
    hidden, own, other = make_hidden(33, D, 0.4), head_of("bias"), head_of("softcap", seed=9)
    config = popsd.DivergenceConfig(beta=beta, temperature=1.1)
    student = hidden.student.double().requires_grad_()
    loss = oracle.jsd(oracle.head_logits(student, own), oracle.head_logits(hidden.teacher, other), config)
    loss.sum().backward()
    leaf = hidden.student.clone().requires_grad_()
    output = popsd.linear_jsd(leaf, own, hidden.teacher, other, config=config, impl="torch")
    output.loss.sum().backward()
    assert relative_l2(output.loss, loss) < 1e-5
    assert relative_l2(leaf.grad, student.grad) < 2e-5


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_from_logits(beta, dtype):
    head, config = head_of("plain"), PurifiedConfig(beta=beta, temperature=1.3, vocab_size=200, pmi_clip=2.0)
    streams = [oracle.head_logits(x, head).to(dtype).view(3, 11, V) for x in make_hidden(33, D, 0.4)]
    upstream = torch.rand(3, 11)
    for name, count in (("purified_jsd", 4), ("jsd", 2)):
        exact = streams[0].double().requires_grad_()
        loss = getattr(oracle, name)(exact, *streams[1:count], config)
        (loss * upstream).sum().backward()
        leaf = streams[0].clone().requires_grad_()
        output = getattr(popsd, name)(leaf, *streams[1:count], config=config, impl="torch", workspace_mib=0.02)
        (output.loss * upstream).sum().backward()
        assert output.loss.shape == (3, 11)
        assert relative_l2(output.loss, loss) < 1e-5
        assert relative_l2(leaf.grad, exact.grad) < (2e-5 if dtype == torch.float32 else 4e-3)
        assert (leaf.grad[..., 200:] == 0).all()
    target = popsd.purified_target_logits(*streams[1:], config=config)
    exact_target = oracle.purified_target_logits(*streams[1:], config)
    assert relative_l2(torch.softmax(target, -1), torch.softmax(exact_target, -1)) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_impossible_tokens_are_safe(beta):
    """-inf logits and biases: the same as a vocabulary without those entries, in value and gradient."""
    config, hidden, head = PurifiedConfig(beta=beta), make_hidden(9, D, 0.4), head_of("plain")
    bias = torch.zeros(V)
    bias[50:90] = -torch.inf
    kept = torch.isfinite(bias)
    upstream = torch.ones(9)
    truth = true_purified(hidden, (Head(head.weight[kept]),) * 2, config, upstream)
    output, dhidden = run(hidden, Head(head.weight, bias), None, config, upstream)
    assert relative_l2(output.loss, truth.loss) < 1e-5
    assert relative_l2(dhidden, truth.dhidden) < 2e-5
    streams = [oracle.head_logits(x, head).float().masked_fill(~kept, -torch.inf) for x in hidden]
    leaf = streams[0].clone().requires_grad_()
    from_logits = popsd.purified_jsd(leaf, *streams[1:], config=config, impl="torch")
    from_logits.loss.sum().backward()
    assert relative_l2(from_logits.loss, truth.loss) < 1e-5
    assert torch.isfinite(leaf.grad).all() and (leaf.grad[:, ~kept] == 0).all()


def test_extreme_logits_stay_finite():
    hidden, head = make_hidden(16, D, 1.0), make_head(V, D, std=80.0)
    for beta in (0.0, 0.5, 1.0):
        output, dhidden = run(hidden, head, None, PurifiedConfig(beta=beta), torch.ones(16))
        assert torch.isfinite(output.loss).all() and torch.isfinite(dhidden).all() and dhidden.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_may_hold_anything(dtype):
    hidden, head = make_hidden(12, D, 0.4, dtype=dtype), head_of("plain", dtype=dtype)
    head.weight.requires_grad_()
    weights = torch.rand(12) + 0.1
    weights[[2, 5]] = 0
    dirty = HiddenStates(*(x.clone() for x in hidden))
    for x in dirty:
        x[2], x[5] = float("nan"), float("inf")
    results = []
    for streams in (hidden, dirty):
        for reduction in ("none", "sum"):
            head.weight.grad = None
            leaf = streams.student.clone().requires_grad_()
            output = popsd.linear_purified_jsd(
                streams._replace(student=leaf), head, weights=weights, reduction=reduction, impl="torch"
            )
            output.loss.sum().backward()
            assert (output.divergence[[2, 5]] == 0).all() and (leaf.grad[[2, 5]] == 0).all()
            results.append((output.loss.sum(), leaf.grad, head.weight.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_l2(b, a) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D)])
def test_no_tokens_give_zero_and_a_connected_graph(shape):
    streams = HiddenStates(*(torch.zeros(shape) for _ in range(4)))
    leaf, head = streams.student.clone().requires_grad_(), head_of("bias")
    head.weight.requires_grad_()
    for reduction in ("none", "sum"):
        output = popsd.linear_purified_jsd(
            streams._replace(student=leaf), head, reduction=reduction, decompose=True, impl="torch"
        )
        assert output.divergence.shape == shape[:-1] == output.decomposition.total_norm.shape
        output.loss.sum().backward()
        assert output.loss.sum() == 0 and leaf.grad.shape == shape and head.weight.grad.abs().max() == 0


def test_all_tokens_masked():
    hidden, head = make_hidden(6, D, 0.4), head_of("plain")
    leaf = hidden.student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(hidden._replace(student=leaf), head, weights=torch.zeros(6), impl="torch")
    output.loss.sum().backward()
    assert output.loss.sum() == 0 and (leaf.grad == 0).all()


def test_no_gradient_work_without_gradients(monkeypatch):
    """Under no_grad, and for a student that needs none, no gradient buffer exists and nothing is projected back."""
    from popsd.engine import sources

    made = []
    original = sources.ProjectedStreams.allocate

    def spy(self, rows, gradient_rows):
        original(self, rows, gradient_rows)
        made.append(self.gradient(0, 0, 1) is not None)

    monkeypatch.setattr(sources.ProjectedStreams, "allocate", spy)
    hidden, head = make_hidden(6, D, 0.4), head_of("plain")
    leaf = hidden.student.clone().requires_grad_()
    with torch.no_grad():
        assert not popsd.linear_purified_jsd(hidden._replace(student=leaf), head).loss.requires_grad
    assert not popsd.linear_purified_jsd(hidden, head).loss.requires_grad
    popsd.linear_purified_jsd(hidden._replace(student=leaf), head)
    assert made == [False, False, True]


def test_shapes_strides_and_chunks_do_not_matter():
    hidden, head, config = make_hidden(60, D, 0.4), head_of("bias"), PurifiedConfig(beta=0.3)
    upstream = torch.rand(60)
    expected, grad = run(hidden, head, None, config, upstream)
    for mib in (0.004, 0.05, 0.3):
        output, other = run(hidden, head, None, config, upstream, workspace_mib=mib)
        assert relative_l2(output.loss, expected.loss) < 1e-6 and relative_l2(other, grad) < 1e-6
    strided = HiddenStates(*(torch.stack([x, x], dim=-1)[..., 0] for x in hidden))
    wide = torch.zeros(V, 2 * D)
    wide[:, ::2] = head.weight
    output, other = run(strided, Head(wide[:, ::2], head.bias), None, config, upstream)
    assert relative_l2(output.loss, expected.loss) < 1e-6 and relative_l2(other, grad) < 1e-6
    batched = HiddenStates(*(x.view(4, 15, D).transpose(0, 1).contiguous().transpose(0, 1) for x in hidden))
    output, other = run(batched, head, None, config, upstream.view(4, 15))
    assert output.loss.shape == (4, 15) and other.shape == (4, 15, D)
    assert relative_l2(output.loss.flatten(), expected.loss) < 1e-6 and relative_l2(other.flatten(0, 1), grad) < 1e-6


def test_autocast_and_mixed_dtypes():
    """bf16 hidden states with a float32 head, as under autocast; gradients come back in each tensor's dtype."""
    hidden, head = make_hidden(20, D, 0.4, dtype=torch.bfloat16), head_of("plain")
    head.weight.requires_grad_()
    truth = true_purified(hidden, (head, head), PurifiedConfig(), torch.ones(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, dhidden = run(hidden, head, None, PurifiedConfig(), torch.ones(20))
    assert output.loss.dtype == torch.float32 and dhidden.dtype == torch.bfloat16
    assert relative_l2(output.loss, truth.loss) < 2e-3 and relative_l2(dhidden, truth.dhidden) < 6e-3
    assert head.weight.grad.dtype == torch.float32 and relative_l2(head.weight.grad, truth.dweight) < 2e-3


def test_frozen_streams_get_no_gradient():
    hidden, head = make_hidden(5, D, 0.4), head_of("plain")
    leaves = HiddenStates(*(x.clone().requires_grad_() for x in hidden))
    popsd.linear_purified_jsd(leaves, head).loss.sum().backward()
    assert leaves.student.grad is not None
    assert all(x.grad is None for x in leaves[1:])


def test_repeated_backward_and_gradcheck_of_upstream():
    """Any upstream gradient, several times over one graph: the saved gradient is never overwritten."""
    hidden, head = make_hidden(8, D, 0.4), head_of("plain")
    leaf = hidden.student.clone().requires_grad_()
    loss = popsd.linear_purified_jsd(hidden._replace(student=leaf), head).loss
    first = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]
    rows = torch.stack([torch.autograd.grad(loss[i], leaf, retain_graph=True)[0] for i in range(8)])
    torch.testing.assert_close(rows.sum(0), first)
    for i, j in itertools.permutations(range(8), 2):
        assert (rows[i, j] == 0).all()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_logits(kind, dtype):
    hidden, head = make_hidden(9, D, 0.4, dtype=dtype).student, head_of(kind, dtype=dtype)
    assert relative_l2(popsd.head_logits(hidden, head), oracle.head_logits(hidden, head)) < 1e-5
    with pytest.raises(ValueError, match=r"hidden: expected shape \[N, 24\]"):
        popsd.head_logits(hidden[:, 1:], head)


@pytest.mark.usefixtures("interpreter")
def test_a_clip_that_the_kernels_have_no_digits_for_is_refused_by_them_alone():
    """At 1e4 the loss was off by 6e-4 of itself."""
    hidden, head, config = make_hidden(3, 16, 0.4), make_head(50, 16), PurifiedConfig(pmi_clip=1e4)
    logits = [x @ head.weight.T for x in hidden]
    for compute in (
        lambda impl: popsd.linear_purified_jsd(hidden, head, config=config, impl=impl),
        lambda impl: popsd.purified_jsd(*logits, config=config, impl=impl),
        lambda impl: popsd.purified_target_logits(*logits[1:], config=config, impl=impl),
    ):
        compute("torch")
        with pytest.raises(ValueError, match=r"pmi_clip: expected at most 1000 .*; got 10000. Pass pmi_clip=None"):
            compute("triton")
    popsd.purified_jsd(*logits, config=PurifiedConfig(pmi_clip=1e8), impl="triton")  # no tanh at all
