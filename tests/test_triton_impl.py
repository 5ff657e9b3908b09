"""The public functions with ``impl="triton"``: real kernels in Triton's interpreter, through the real tile loop."""

import kernel_helpers  # noqa: F401  (decorates the kernels for the interpreter)
import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, oracle
from popsd.testing import make_head, make_hidden, relative_l2, true_jsd, true_purified

N, V, D = 5, 157, 24
HEADS = {"plain": {}, "bias": {"bias": True}, "softcap": {"softcap": 8.0}, "scale": {"logit_scale": 0.6}}
OPTIONS = {
    "temperature": {"temperature": 1.2, "vocab_size": 150},
    "clips": {"entry_clip": 0.01, "pmi_clip": 0.5},
    "unclipped": {"pmi_clip": None, "pmi_beta": 2.0},
    "uncentred": {"center": False, "pmi_clip": 1.0},
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def head_of(kind: str, dtype: torch.dtype = torch.float32) -> Head:
    options = dict(HEADS[kind])
    made = make_head(V, D, bias=options.pop("bias", False), dtype=dtype)
    return Head(made.weight, made.bias, **options)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_purified_matches_the_oracle(beta, options, kind):
    hidden, head, config = make_hidden(N, D, 0.4), head_of(kind), PurifiedConfig(beta=beta, **options)
    upstream = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5])
    truth = true_purified(hidden, (head, head), config, upstream)
    leaf = hidden.student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(
        hidden._replace(student=leaf), head, config=config, weights=upstream, impl="triton", workspace_mib=0.004
    )
    output.loss.sum().backward()
    assert relative_l2(output.loss, truth.loss * upstream) < 1e-5
    assert relative_l2(leaf.grad, truth.dhidden) < 2e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_each_token_is_accurate_where_one_entry_has_nearly_all_the_mass(beta):
    """Without Σ(p − q) taken out the forward gradient is off by 1e-3, forward and reverse losses by 3e-7 (of 2e-5 to 1e-2)."""
    hidden, head, config = make_hidden(100, 64, 0.01), make_head(2048, 64, 10.0), PurifiedConfig(beta=beta)
    everything = true_purified(hidden, (head, head), config, torch.ones(100)).loss
    top = oracle.head_logits(hidden.student, head).softmax(-1).amax(-1)
    few = (top > 0.97) & (everything > 2e-5) & (everything < 1e-2)
    hidden = HiddenStates(*(x[few] for x in hidden))
    count = int(few.sum())
    assert count > 10
    truth, leaf = (
        true_purified(hidden, (head, head), config, torch.ones(count)),
        hidden.student.clone().requires_grad_(),
    )
    output = popsd.linear_purified_jsd(hidden._replace(student=leaf), head, config=config, impl="triton")
    output.loss.sum().backward()
    errors = (leaf.grad.double() - truth.dhidden).norm(dim=-1) / truth.dhidden.norm(dim=-1)
    assert errors.max() < 5e-5
    assert (output.loss - truth.loss).abs().max() < 1e-7


@pytest.mark.parametrize("two", [False, True], ids=["purified", "two"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_float32_gradients_are_accurate_where_student_and_target_nearly_agree(beta, two):
    """The base travels as its difference to the student: 1e-5 where logits projected apart leave 2e-5 to 8e-5."""
    hidden, head = make_hidden(N, 64, 0.004), make_head(1003, 64, 10.0, bias=True)
    head, config, upstream = Head(head.weight, head.bias, 0.9), PurifiedConfig(beta=beta), torch.ones(N)
    leaf = hidden.student.clone().requires_grad_()
    if two:
        output = popsd.linear_jsd(leaf, head, hidden.teacher, config=config, impl="triton")
        truth = true_jsd(hidden.student, hidden.teacher, (head, head), config, upstream)
    else:
        output = popsd.linear_purified_jsd(hidden._replace(student=leaf), head, config=config, impl="triton")
        truth = true_purified(hidden, (head, head), config, upstream)
    output.loss.sum().backward()
    assert (output.loss.double() - truth.loss).abs().max() < 1e-6
    assert relative_l2(leaf.grad, truth.dhidden) < (3e-5 if beta == 0.0 else 1.5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainable_head_and_two_distributions(dtype):
    hidden, head = make_hidden(N, D, 0.4, dtype=dtype), head_of("bias", dtype)
    config = PurifiedConfig(beta=0.5)
    truth = true_jsd(hidden.student, hidden.teacher, (head, head), config, torch.ones(N))
    leaf = hidden.student.clone().requires_grad_()
    head.weight.requires_grad_()
    output = popsd.linear_jsd(leaf, head, hidden.teacher, config=config, impl="triton", reduction="sum")
    output.loss.backward()
    bound = 2e-5 if dtype == torch.float32 else 6e-3
    assert relative_l2(leaf.grad, truth.dhidden) < bound
    assert relative_l2(head.weight.grad, truth.dweight) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_result_equals_the_torch_bodies(dtype):
    hidden, head = make_hidden(N, D, 0.4), head_of("plain")
    logits = [(x @ head.weight.T).to(dtype).index_fill(1, torch.tensor([4, 9]), -torch.inf) for x in hidden]
    config, ids = PurifiedConfig(beta=0.3, token_clip=0.2), torch.tensor([3, 5, -1, 0, 150])
    results = {}
    for impl in ("torch", "triton"):
        leaf = logits[0].clone().requires_grad_()
        output = popsd.purified_jsd(leaf, *logits[1:], config=config, token_ids=ids, decompose=True, impl=impl)
        output.loss.sum().backward()
        fields = [x for x in output if isinstance(x, torch.Tensor)] + list(output.decomposition)
        results[impl] = [*fields, leaf.grad.float()]
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=2e-6, equal_nan=True
        )


def test_target_logits_and_no_tokens():
    logits = [torch.randn(3, 4, V) for _ in range(3)]
    torch.testing.assert_close(
        popsd.purified_target_logits(*logits, impl="triton"), popsd.purified_target_logits(*logits, impl="torch")
    )
    nothing = HiddenStates(*(torch.zeros(0, D) for _ in range(4)))
    leaf = nothing.student.requires_grad_()
    popsd.linear_purified_jsd(nothing, head_of("plain"), impl="triton").loss.sum().backward()
    assert leaf.grad.shape == (0, D)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("strategy", ["streaming", "single_read"])
def test_strategies_match_the_oracle(strategy, beta):
    hidden, head = make_hidden(N, D, 0.4), head_of("scale")
    config, upstream = PurifiedConfig(beta=beta, vocab_size=150), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5])
    truth = true_purified(hidden, (head, head), config, upstream)
    leaf = hidden.student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(
        hidden._replace(student=leaf), head, config=config, weights=upstream, impl="triton", strategy=strategy
    )
    output.loss.sum().backward()
    assert relative_l2(output.loss, truth.loss * upstream) < 1e-5
    assert relative_l2(leaf.grad, truth.dhidden) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_streaming_trains_a_head_and_keeps_its_padding_rows(dtype, reduction):
    hidden, own, frozen = (
        make_hidden(N, D, 0.4, dtype=dtype),
        head_of("bias", dtype),
        make_head(V, D, seed=7, dtype=dtype),
    )
    config = PurifiedConfig(beta=0.3, vocab_size=150)
    truth = true_jsd(hidden.student, hidden.teacher, (own, frozen), config, torch.ones(N))
    leaf = hidden.student.clone().requires_grad_()
    weight, bias = own.weight.requires_grad_(), own.bias.requires_grad_()
    output = popsd.linear_jsd(
        leaf, own, hidden.teacher, frozen, config=config, impl="triton", strategy="streaming", reduction=reduction
    )
    output.loss.sum().backward()
    bound = 2e-5 if dtype == torch.float32 else 8e-3
    assert relative_l2(leaf.grad, truth.dhidden) < bound
    assert relative_l2(weight.grad, truth.dweight) < bound
    assert relative_l2(bias.grad, truth.dbias) < bound
    assert (weight.grad[150:] == 0).all()
