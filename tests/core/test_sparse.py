"""A target whose likeliest entries alone are known, against the float64 oracle and against whole distributions."""

import doctest
import math
import re
from pathlib import Path

import pytest
import torch

import popsd
from popsd import DivergenceConfig, Head, MaskConfig, SparseTarget, oracle
from popsd.testing import make_head, make_hidden, relative_l2

N, V, D, K = 13, 211, 24, 7
BETAS = [0.0, 0.3, 0.5, 1.0]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale, softcap": {"bias": True, "logit_scale": 1.4, "softcap": 9.0},
}
OPTIONS = {
    "default": {},
    "temperature": {"temperature": 1.6},
    "entry_clip": {"entry_clip": 0.02},
    "token_clip": {"token_clip": 0.05},
    "vocab_size": {"vocab_size": 190},
}


def head_of(kind="plain", **more):
    options = dict(HEADS[kind])
    head = make_head(V, D, bias=options.pop("bias", False), **more)
    return Head(head.weight, head.bias, **options)


def target_of(logits, k=K):
    """As a server sends it: the likeliest k of each token and the sampled one, which may stand among them; one token has
    fewer, one none."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    top = log_probs.topk(k).indices
    ids = torch.cat([top, torch.arange(len(logits))[:, None] * 3 % logits.shape[1]], dim=1)
    ids[3, -1] = ids[3, 2]
    values = log_probs.gather(1, ids)
    ids[1, 2:], values[2, 3:] = -1, -torch.inf
    ids[4] = -1
    return SparseTarget(ids, values.float())


def problem(kind="plain", spread=0.4, vocab=V, **more):
    hidden, head = make_hidden(N, D, spread), head_of(kind, **more)
    return hidden.student, head, target_of(oracle.head_logits(hidden.teacher, head)[:, :vocab])


def truth(hidden, head, target, config, upstream, **options):
    """The oracle's loss, and gradients of Σ upstream·loss with respect to hidden states, weight and bias."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None]
    own = Head(leaves[1], leaves[2] if len(leaves) > 2 else None, head.logit_scale, head.softcap)
    loss = oracle.sparse_jsd(oracle.head_logits(leaves[0], own), target, config, **options)
    (loss * upstream.double()).sum().backward()
    return loss.detach(), *(x.grad for x in leaves)


def run(hidden, head, target, upstream, **options):
    leaf = hidden.clone().requires_grad_()
    output = popsd.linear_sparse_jsd(leaf, head, target, **options)
    (output.loss * upstream).sum().backward()
    return output, leaf.grad


@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_the_oracle_is_differentiated_rightly(add_tail, beta):
    logits, _, target = problem()
    logits = oracle.head_logits(logits, head_of())[1:6, :6].requires_grad_()
    target = SparseTarget(target.ids[1:6, :4].clamp_max(5), target.log_probs[1:6, :4] - 1.0)
    config = DivergenceConfig(beta=beta)
    assert torch.autograd.gradcheck(lambda z: oracle.sparse_jsd(z, target, config, add_tail=add_tail), logits)


@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_the_oracle_by_hand(add_tail, beta):
    """Two entries of four, and the other two as one."""
    p, q = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.6], dtype=torch.float64)
    target = SparseTarget(torch.tensor([[2, 0]]), q.log()[None])
    p = torch.tensor([0.2, 0.5, 0.3] if add_tail else [0.2 / 0.7, 0.5 / 0.7], dtype=torch.float64)
    q = torch.tensor([0.1, 0.6, 0.3] if add_tail else [0.1 / 0.7, 0.6 / 0.7], dtype=torch.float64)
    m = (1 - beta) * p + beta * q
    kl = {"q": (q * (q / m).log()).sum(), "p": (p * (p / m).log()).sum()}
    expected = {0.0: kl["q"], 1.0: kl["p"]}.get(beta, beta * kl["q"] + (1 - beta) * kl["p"])
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log()
    found = oracle.sparse_jsd(logits, target, DivergenceConfig(beta=beta), add_tail=add_tail)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_it_matches_the_oracle(options, kind, add_tail):
    """With empty places, tokens without any entry and an id twice in a row; in several chunks."""
    config = DivergenceConfig(beta=0.3, **options)
    hidden, head, target = problem(kind, vocab=config.vocab_size or V)
    upstream = torch.rand(N) + 0.5
    loss, dhidden, *_ = truth(hidden, head, target, config, upstream, add_tail=add_tail)
    output, found = run(hidden, head, target, upstream, config=config, add_tail=add_tail, workspace_mib=0.004)
    assert relative_l2(output.loss, loss) < 1e-5
    assert relative_l2(found, dhidden) < 2e-5
    assert output.loss[4] == 0 and not found[4].any(), "nothing is known of it"
    if "entry_clip" in options:
        assert (output.clip_fraction > 0).any()
    if "token_clip" in options:
        assert 0 < output.token_clipped.sum() < N


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_trained_head(beta, add_tail, reduction):
    config = DivergenceConfig(beta=beta)
    hidden, head, target = problem("scale, softcap")
    trained = Head(head.weight.requires_grad_(), head.bias.requires_grad_(), head.logit_scale, head.softcap)
    upstream = torch.tensor(1.7) if reduction == "sum" else torch.rand(N) + 0.5
    _, *expected = truth(hidden, head, target, config, upstream, add_tail=add_tail)
    _, dhidden = run(hidden, trained, target, upstream, config=config, add_tail=add_tail, reduction=reduction)
    for found, right in zip((dhidden, head.weight.grad, head.bias.grad), expected, strict=True):
        assert relative_l2(found, right) < 2e-5


@pytest.mark.parametrize(("tokens", "k", "std"), [(1, 1, 3.0), (127, 64, 20.0), (129, 3, 20.0)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_irregular_sizes_and_large_logits(tokens, k, std, beta):
    """V one more than a block of 1024, logits of ±80, hidden states that are not contiguous, a target that is far away."""
    hidden, head, config = make_hidden(tokens, 2 * D, 0.4), make_head(1025, D, std), DivergenceConfig(beta=beta)
    states = hidden.student[:, ::2]
    top = torch.log_softmax(oracle.head_logits(hidden.teacher[:, 1::2], head), dim=-1).topk(k)
    target, upstream = SparseTarget(top.indices, top.values.float()), torch.ones(tokens)
    loss, dhidden, _ = truth(states, head, target, config, upstream)
    assert tokens == 1 or oracle.head_logits(states, head).abs().max() > 80
    output, found = run(states, head, target, upstream, config=config, workspace_mib=0.1)
    assert relative_l2(output.loss, loss) < 1e-5
    assert relative_l2(found, dhidden) < 2e-5


@pytest.mark.parametrize("alpha", [0.5, 0.95])
def test_renyi(alpha):
    config, (hidden, head, target) = DivergenceConfig(beta=0.0, renyi_alpha=alpha), problem()
    loss, dhidden, _ = truth(hidden, head, target, config, torch.ones(N))
    output, found = run(hidden, head, target, torch.ones(N), config=config)
    assert relative_l2(output.loss, loss) < 1e-5
    assert relative_l2(found, dhidden) < 2e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_all_entries_are_the_whole_distribution(beta, add_tail):
    """k = V: there is no tail, and the loss is that of two distributions."""
    hidden, head = make_hidden(N, D, 0.4), head_of("bias")
    log_probs, ids = torch.log_softmax(popsd.head_logits(hidden.teacher, head), dim=1).sort(dim=1)
    config, leaf = DivergenceConfig(beta=beta), hidden.student.clone().requires_grad_()
    whole = popsd.linear_jsd(leaf, head, hidden.teacher, config=config)
    whole.loss.sum().backward()
    target = SparseTarget(ids, log_probs)
    output, found = run(hidden.student, head, target, torch.ones(N), config=config, add_tail=add_tail)
    assert relative_l2(found, leaf.grad) < 1e-5
    for name in ("loss", "student_kl", "target_kl", "student_entropy", "target_entropy", "argmax_agreement"):
        if getattr(whole, name).any():
            assert relative_l2(getattr(output, name), getattr(whole, name)) < 1e-5, name


@pytest.mark.parametrize("beta", BETAS)
def test_a_tiny_tail_keeps_its_digits(beta):
    """The student's mass outside is 1e-12 to 1e-5, which 1 − Σ of float32 probabilities could not see."""
    hidden, head = make_hidden(N, D, 0.02), head_of(std=18.0)
    logits = oracle.head_logits(hidden.student, head)
    tail = -torch.expm1(torch.log_softmax(logits, dim=1).topk(K).values.logsumexp(1))
    assert tail.min() < 1e-8
    target = target_of(logits + 0.3 * torch.randn(N, V, generator=torch.Generator().manual_seed(0)))
    config, alone = DivergenceConfig(beta=beta), torch.ones(N)
    loss, _, dweight = truth(hidden.student, head, target, config, alone)
    trained = Head(head.weight.requires_grad_())
    output, _ = run(hidden.student, trained, target, alone, config=config)
    assert relative_l2(output.loss, loss) < 2e-5
    listed = torch.zeros(V, dtype=torch.bool)
    listed[target.ids.clamp_min(0)] = True
    assert relative_l2(head.weight.grad[~listed], dweight[~listed]) < 1e-4, "what the tail alone moves"


def test_the_least_tail_of_a_target():
    """Listed probabilities that add up to 1, or by rounding to more, leave 1e-7 to the others: no KL is infinite."""
    hidden, head, _ = problem()
    ids = torch.arange(N)[:, None].expand(N, 2) + torch.tensor([0, 5])
    log_probs = torch.tensor([0.5, 0.501]).log().expand(N, 2)
    config, target = DivergenceConfig(beta=1.0), SparseTarget(ids, log_probs)
    loss, dhidden, _ = truth(hidden, head, target, config, torch.ones(N))
    output, found = run(hidden, head, target, torch.ones(N), config=config)
    assert relative_l2(output.loss, loss) < 1e-5
    assert relative_l2(found, dhidden) < 2e-5


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_impossible_entries(beta):
    """A bias of -inf on an entry of the target: forward KL is infinite, reverse KL leaves it out."""
    hidden, head, target = problem("bias")
    head.bias[target.ids[0, 0]] = -torch.inf
    output, found = run(hidden, head, target, torch.ones(N), config=DivergenceConfig(beta=beta))
    assert math.isinf(output.loss[0].item()) == (beta == 0.0)
    if beta == 1.0:
        low = Head(head.weight, head.bias.clamp_min(-1e4))  # autograd makes NaN of 0 · inf
        loss, dhidden, *_ = truth(hidden, low, target, DivergenceConfig(beta=beta), torch.ones(N))
        assert relative_l2(output.loss, loss) < 1e-5
        assert relative_l2(found, dhidden) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs(dtype):
    hidden, head, target = problem()
    hidden, head = hidden.to(dtype), Head(head.weight.to(dtype))
    loss, dhidden, _ = truth(hidden, head, target, DivergenceConfig(), torch.ones(N))
    output, found = run(hidden, head, target, torch.ones(N))
    assert found.dtype == dtype and output.loss.dtype == torch.float32
    assert relative_l2(output.loss, loss) < 1e-5
    assert relative_l2(found, dhidden) < 2.0**-8


def test_equal_logits():
    """Ties: whichever of equal entries a server lists, the loss is the same."""
    hidden, head, config = torch.zeros(2, D), head_of(), DivergenceConfig(beta=0.3)
    target = SparseTarget(torch.tensor([[5, 9], [200, 3]]), torch.tensor([0.5, 0.25]).log().expand(2, 2))
    output = popsd.linear_sparse_jsd(hidden, head, target, config=config)
    assert output.loss[0] == pytest.approx(float(output.loss[1]), rel=1e-6)
    expected = oracle.sparse_jsd(torch.zeros(2, V), target, config)
    assert relative_l2(output.loss, expected) < 1e-5


def test_weights_mask_whatever_a_token_holds():
    hidden, head, target = problem()
    weights, upstream = torch.rand(N) + 0.5, torch.ones(N)
    weights[2] = 0.0
    output, found = run(hidden, head, target, upstream, weights=weights)
    hidden[2], target.log_probs[2] = torch.nan, torch.nan
    same, masked = run(hidden, head, target, upstream, weights=weights)
    assert torch.equal(masked, found) and torch.equal(same.loss, output.loss)
    assert not masked[2].any() and output.loss[2] == 0
    total, other = run(hidden, head, target, torch.ones(()), weights=weights, reduction="sum")
    assert relative_l2(total.loss, output.loss.sum()) < 1e-6 and relative_l2(other, found) < 1e-6


def test_completions_with_a_coefficient_each_and_masks():
    hidden, head, target = problem()
    batch, target = hidden[:12].view(3, 4, D), SparseTarget(*(x[:12].view(3, 4, K + 1) for x in target))
    betas = torch.tensor([0.0, 1.0, 0.3])
    output, dhidden = run(batch, head, target, torch.ones(()), beta=betas, masks=MaskConfig(skip_first=2))
    assert output.loss.shape == (3, 4) and not output.loss[:, :2].any() and not dhidden[:, :2].any()
    for i, beta in enumerate(betas.tolist()):
        own = SparseTarget(target.ids[i], target.log_probs[i])
        alone, gradient = run(batch[i], head, own, torch.ones(()), config=DivergenceConfig(beta=beta))
        assert torch.equal(output.loss[i, 2:], alone.loss[2:])
        assert torch.equal(dhidden[i, 2:], gradient[2:])


@pytest.mark.parametrize("add_tail", [True, False])
def test_sampled_tokens(add_tail):
    """The student's log-probability is over the whole vocabulary; the target's is known where it lists the token."""
    hidden, head, target = problem()
    ids = target.ids[:, 0].clone()
    ids[5], ids[6], ids[4] = 201, -1, 3
    output = popsd.linear_sparse_jsd(hidden, head, target, token_ids=ids, add_tail=add_tail)
    expected = oracle.sampled(torch.log_softmax(oracle.head_logits(hidden, head), dim=-1), ids)
    known = torch.tensor([i not in (4, 5, 6) for i in range(N)])
    assert 201 not in target.ids[5]
    assert output.token_logprob[6].isnan() and output.target_logprob[~known].isnan().all()
    given = ids >= 0
    assert relative_l2(output.token_logprob[given], expected[given]) < 1e-6
    if add_tail:
        assert relative_l2(output.target_logprob[known], target.log_probs[known, 0]) < 1e-6


def test_the_default_dtype_has_no_say():
    hidden, head, target = problem("scale, softcap")
    before, default = run(hidden, head, target, torch.ones(N)), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        after = run(hidden, head, target, torch.ones(N))
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(after[0].loss, before[0].loss) and torch.equal(after[1], before[1])


def test_no_tokens():
    target = SparseTarget(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
    output, found = run(torch.zeros(0, D), head_of(), target, torch.ones(0))
    assert output.loss.shape == (0,) and found.shape == (0, D)


def test_compiles_as_one_graph():
    hidden, head, target = problem()
    results = []

    def step(x, weight, ids, log_probs):
        return popsd.linear_sparse_jsd(x, Head(weight), SparseTarget(ids, log_probs)).loss.sum() * 2.0

    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf, weight = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
        loss = function(leaf, weight, *target)
        loss.backward()
        results.append([loss.detach(), leaf.grad, weight.grad])
    for eager, compiled in zip(*results, strict=True):
        assert relative_l2(compiled, eager) < 1e-6


IDS, LOG_PROBS = torch.zeros(N, 2, dtype=torch.long), torch.full((N, 2), -1.0)
REFUSED = {
    "type": ((IDS, LOG_PROBS), {}, TypeError, r"target: expected a popsd\.SparseTarget; got tuple"),
    "ids": (SparseTarget(IDS.int(), LOG_PROBS), {}, TypeError, r"target\.ids: expected int64; got torch\.int32"),
    "floating": (SparseTarget(IDS, IDS), {}, TypeError, r"target\.log_probs: expected a floating dtype"),
    "tokens": (SparseTarget(IDS[1:], LOG_PROBS), {}, ValueError, r"target\.ids: expected shape \[13, 'k'\]"),
    "no k": (SparseTarget(IDS[:, :0], LOG_PROBS), {}, ValueError, r"target\.ids: .* k of at least 1"),
    "shapes": (SparseTarget(IDS, LOG_PROBS[:, :1]), {}, ValueError, r"expected the shape of target\.ids, \[13, 2\]"),
    "range": (SparseTarget(IDS + V, LOG_PROBS), {}, ValueError, r"target\.ids: expected entries in \[0, 211\) or -1"),
    "logits": (SparseTarget(IDS, LOG_PROBS + 4), {}, ValueError, r"add up to at most 1; got a sum of 20\.09 in token"),
    "nan": (SparseTarget(IDS, LOG_PROBS * torch.nan), {}, ValueError, r"add up to at most 1; got a sum of nan"),
    "tail": (SparseTarget(IDS, LOG_PROBS), {"add_tail": 1}, TypeError, r"add_tail: expected True or False"),
    "impl": (SparseTarget(IDS, LOG_PROBS), {"impl": "triton"}, ValueError, r"impl: expected 'auto' or 'torch'"),
    "config": (
        SparseTarget(IDS, LOG_PROBS),
        {"config": popsd.presets.arithmetic_mix(0.3)},
        TypeError,
        r"config: expected a popsd\.DivergenceConfig",
    ),
    "masks": (
        SparseTarget(IDS, LOG_PROBS),
        {"masks": MaskConfig(max_reference_fraction=1.0)},
        ValueError,
        r"masks: .* need the streams of a purified loss",
    ),
}


@pytest.mark.parametrize(("target", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(target, options, error, message, interpreter):
    with pytest.raises(error, match=message):
        popsd.linear_sparse_jsd(torch.randn(N, D), head_of(), target, **options)


def test_a_frozen_target_says_that_it_has_no_gradient():
    hidden, head, target = problem()
    ids, log_probs = target
    assert not popsd.linear_sparse_jsd(hidden, head, SparseTarget(ids, log_probs.requires_grad_())).loss.requires_grad


def test_verl_s_forward_kl_has_the_gradient_that_the_page_says():
    hidden, head, (ids, log_probs) = problem()
    ids, log_probs = ids[:, :K], log_probs[:, :K].clamp_min(-30.0)
    ids = torch.arange(N * K).view(N, K) % V
    mass = log_probs.logsumexp(-1)
    _, found = run(
        hidden, head, SparseTarget(ids, log_probs - mass[:, None]), torch.ones(N), weights=mass.exp(),
        config=DivergenceConfig(beta=0.0),
    )  # fmt: skip
    leaf = hidden.double().requires_grad_()
    own = torch.log_softmax(oracle.head_logits(leaf, head), dim=-1).gather(1, ids)
    (log_probs.double().exp() * (log_probs.double() - own)).sum().backward()
    assert relative_l2(found, leaf.grad) < 1e-5


def test_the_page_about_remote_teachers_runs():
    page = (Path(__file__).parents[2] / "docs" / "remote_teacher.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["target"].ids.tolist() == [[2, 4, 7], [3, 6, -1]]
    assert names["output"].loss > 0 and names["hidden"].grad.any()
    top = [None, [(-0.2, 5, None)], [(-0.7, 2, None), (-0.9, 4, None)], [(-0.1, 3, None), (-2.6, 6, None)]]
    own = [(None, 11, None), (-0.2, 5, None), (-4.1, 7, None), (-0.1, 3, None)]
    rows = names["from_sglang"]({"input_top_logprobs": top, "input_token_logprobs": own}, 2)
    assert rows == [([2, 4, 7], [-0.7, -0.9, -4.1]), ([3, 6, 3], [-0.1, -2.6, -0.1])]


def test_the_example_runs():
    (test,) = doctest.DocTestFinder(recurse=False).find(popsd.linear_sparse_jsd, "linear_sparse_jsd", globs={})
    assert doctest.DocTestRunner().run(test).failed == 0 and test.examples
