"""The forward Rényi divergence against its formula in float64, from near agreement to tokens that one side cannot sample."""

import pytest
import torch

import popsd
from popsd import DivergenceConfig, Head, HiddenStates, PurifiedConfig, oracle
from popsd.testing import make_head, make_hidden, relative_l2

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
N, V, D = 5, 157, 24


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)


def loss_and_gradient(student, target, config, impl="torch"):
    leaf = student.clone().requires_grad_()
    loss = popsd.jsd(leaf, target, config=config, impl=impl).loss
    loss.sum().backward()
    return loss.detach(), leaf.grad


def exact(student, target, config):
    leaf = student.double().requires_grad_()
    loss = oracle.jsd(leaf, target.double(), config)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize(("std", "spread"), [(3.0, 0.03), (3.0, 0.5), (10.0, 0.04), (10.0, 20.0)])
def test_it_matches_the_oracle_at_every_distance(impl, alpha, std, spread):
    generator = torch.Generator().manual_seed(0)
    student = std * torch.randn(N, V, generator=generator)
    target = student + spread * torch.randn(N, V, generator=generator)
    config = DivergenceConfig(beta=0.0, renyi_alpha=alpha, temperature=0.9)
    loss, gradient = loss_and_gradient(student, target, config, impl)
    true_loss, true_gradient = exact(student, target, config)
    assert relative_l2(loss, true_loss) < 2e-5
    # the kernels round the gradient at p, as in forward KL (2.8e-5, 6.8e-5 here); with a small alpha p is more beside it
    assert relative_l2(gradient, true_gradient) < (1e-4 if impl == "triton" else 2e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_impossible_tokens_leave_it_finite(impl):
    """A token that one side alone can sample adds nothing; nor does one whose probability underflows there, or q alone."""
    student, target = 2.0 * torch.randn(2, 3, V, generator=torch.Generator().manual_seed(1))
    student[0, 40:60], target[0, 50:70] = -torch.inf, -torch.inf
    student[1, 0], target[1, 0] = -120.0, 5.0
    config = DivergenceConfig(beta=0.0, renyi_alpha=0.95)
    for found, expected in zip(
        loss_and_gradient(student, target, config, impl), exact(student, target, config), strict=True
    ):
        assert found.isfinite().all() and relative_l2(found, expected) < 2e-5
    student[2], target[2] = -torch.inf, -torch.inf
    student[2, 0], target[2, 1] = 0.0, 0.0
    loss, gradient = loss_and_gradient(student, target, config, impl)
    assert loss[2].isposinf() and gradient.isfinite().all()


def test_its_limit_is_forward_kl():
    student, target = torch.randn(2, N, V)
    near = popsd.jsd(student, target, config=DivergenceConfig(beta=0.0, renyi_alpha=0.9999))
    forward = popsd.jsd(student, target, config=DivergenceConfig(beta=0.0))
    assert relative_l2(near.loss, forward.loss) < 1e-3
    assert relative_l2(near.target_kl, forward.target_kl) < 1e-5 and not near.student_kl.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"token_clip": 0.2}, {"pmi_clip": None}], ids=str)
def test_the_purified_loss_and_a_trained_head(impl, options):
    hidden, head = make_hidden(N, D, 0.4), Head(make_head(V, D).weight.requires_grad_())
    config = PurifiedConfig(beta=0.0, renyi_alpha=0.9, **options)
    logits = [oracle.head_logits(x, head) for x in hidden]
    frozen = [x.detach() for x in logits[1:]]
    expected = oracle.purified_jsd(logits[0], *frozen, config)
    (dweight,) = torch.autograd.grad(expected.sum(), head.weight)
    output = popsd.linear_purified_jsd(hidden, head, Head(head.weight.detach()), config=config, impl=impl)
    output.loss.sum().backward()
    assert relative_l2(output.loss, expected.detach()) < 2e-5 and relative_l2(head.weight.grad, dweight) < 2e-5
    assert (output.token_clipped.sum() > 0) == ("token_clip" in options)


def test_streaming_computes_the_same_and_single_read_refuses():
    hidden, head = make_hidden(N, D, 0.4), make_head(V, D)
    config = PurifiedConfig(beta=0.0, renyi_alpha=0.95)
    found = {}
    for name in ("chunked", "streaming"):
        leaf = hidden.student.clone().requires_grad_()
        streams = HiddenStates(leaf, *hidden[1:])
        loss = popsd.linear_purified_jsd(streams, head, config=config, impl="triton", strategy=name).loss
        loss.sum().backward()
        found[name] = (loss.detach(), leaf.grad)
    for one, other in zip(*found.values(), strict=True):
        assert relative_l2(one, other) < 2e-5
    with pytest.raises(ValueError, match="strategy: 'single_read' needs a configuration without renyi_alpha"):
        popsd.linear_purified_jsd(hidden, head, config=config, impl="triton", strategy="single_read")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"renyi_alpha": 0.9}, ValueError, r"beta: expected 0\.0 with renyi_alpha=0\.9"),
        (
            {"beta": 0.0, "renyi_alpha": 0.9, "entry_clip": 0.1},
            ValueError,
            "entry_clip: expected None with renyi_alpha",
        ),
        ({"beta": 0.0, "renyi_alpha": 1.0}, ValueError, "renyi_alpha: expected a number between 0 and 1"),
        ({"beta": 0.0, "renyi_alpha": "x"}, TypeError, "renyi_alpha: expected a number"),
    ],
)
def test_what_it_has_not_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        DivergenceConfig(**options)
