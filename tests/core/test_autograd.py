"""What autograd does around a loss: checkpoints, hooks, second derivatives, transforms, what requires a gradient, float16."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, PurifiedOPSDLoss
from popsd.engine import problem, sources
from popsd.testing import make_head, make_hidden, relative_l2, true_purified

N, D, V = 6, 8, 23
HIDDEN, HEAD = make_hidden(N, D, 0.4), make_head(V, D, bias=True)
TRAINED = Head(HEAD.weight.clone().requires_grad_())
LOGITS = [x @ HEAD.weight.T for x in HIDDEN]


def frozen(x):
    return popsd.linear_purified_jsd(HIDDEN._replace(student=x), HEAD).loss


def trained(x, reduction="none"):
    return popsd.linear_purified_jsd(HIDDEN._replace(student=x), TRAINED, reduction=reduction).loss


def given(x):
    return popsd.purified_jsd(x, *LOGITS[1:]).loss


PATHS = {
    "frozen head": (frozen, HIDDEN.student),
    "trained head": (trained, HIDDEN.student),
    "trained head, sum": (lambda x: trained(x, "sum"), HIDDEN.student),
    "logits": (given, LOGITS[0]),
}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request):
    """A loss of one tensor, and that tensor."""
    return request.param


def gradient(call, x):
    leaf = x.clone().requires_grad_()
    call(leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(path, reentrant):
    call, x = path
    again = gradient(lambda leaf: checkpoint(lambda y: call(y * 1), leaf, use_reentrant=reentrant), x)
    assert torch.equal(again, gradient(call, x))


def test_hooks_on_saved_tensors_see_each_once(path):
    """As those that offload to the CPU: what is packed is unpacked once, and frozen streams are not packed for nothing."""
    call, x = path
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    def unpack(tensor):
        unpacked.append(tensor.shape)
        return tensor

    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = call(leaf)
        loss.sum().backward()
    assert torch.equal(leaf.grad, gradient(call, x)) and packed
    assert len(unpacked) == len(packed)
    if call is frozen:
        assert sum(shape.numel() for shape in packed) == N * D + N, "dH and the loss, no stream and no head"


@pytest.mark.parametrize("depends", [False, True], ids=["constant upstream", "upstream with a graph"])
def test_a_second_derivative_is_refused(path, depends):
    call, x = path
    leaf = x.clone().requires_grad_()
    loss = call(leaf)
    upstream = torch.ones_like(loss, requires_grad=depends)
    (first,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
    assert torch.equal(first.detach(), gradient(call, x))
    with pytest.raises(
        NotImplementedError, match=r"expected a loss that is differentiated once; got a second derivative"
    ):
        (first.square().sum() + loss.sum()).backward()


def test_transforms_are_refused(path):
    """torch.func.jvp gave a derivative of 0."""
    call, x = path
    for transform in (
        lambda: torch.func.jvp(lambda y: call(y).sum(), (x,), (torch.ones_like(x),)),
        lambda: torch.func.grad(lambda y: call(y).sum())(x),
        lambda: torch.func.hessian(lambda y: call(y).sum())(x),
        lambda: torch.func.vmap(call)(torch.stack([x, x])),
    ):
        with pytest.raises(NotImplementedError, match=r"expected plain tensors.*torch.autograd.grad"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="expected plain tensors"):
        call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_tangents_of_a_head_are_refused():
    for call in (lambda w: Head(w), lambda w: Head(HEAD.weight, w[:, 0])):
        with pytest.raises(NotImplementedError, match="expected plain tensors"):
            torch.func.jvp(
                lambda w, call=call: popsd.linear_purified_jsd(HIDDEN, call(w)).loss.sum(),
                (HEAD.weight,),
                (HEAD.weight,),
            )


def test_a_loss_requires_a_gradient_where_it_has_one():
    """Of the streams the student's alone: a loss that says more trains on nothing."""
    for name in ("base", "teacher", "reference"):
        leaf = getattr(HIDDEN, name).clone().requires_grad_()
        assert not popsd.linear_purified_jsd(HIDDEN._replace(**{name: leaf}), HEAD).loss.requires_grad
        assert not PurifiedOPSDLoss()(HIDDEN._replace(**{name: leaf}), HEAD)[0].requires_grad
    other = Head(HEAD.weight.clone().requires_grad_(), HEAD.bias.clone().requires_grad_())
    assert not popsd.linear_purified_jsd(HIDDEN, HEAD, other).loss.requires_grad
    assert not popsd.linear_jsd(HIDDEN.student, HEAD, HIDDEN.teacher.clone().requires_grad_()).loss.requires_grad
    assert not popsd.jsd(LOGITS[0], LOGITS[1].clone().requires_grad_()).loss.requires_grad
    for index in (1, 2, 3):
        streams = [x.clone().requires_grad_(i == index) for i, x in enumerate(LOGITS)]
        assert not popsd.purified_jsd(*streams).loss.requires_grad
    assert popsd.linear_purified_jsd(HIDDEN, other).loss.requires_grad, "its student's head"


def test_what_comes_to_a_masked_token_from_above_stays_there(path):
    call, x = path
    weights = torch.ones(N)
    weights[2] = 0.0

    def masked(leaf, head):
        if call is given:
            return popsd.purified_jsd(leaf, *LOGITS[1:], weights=weights).loss
        return popsd.linear_purified_jsd(HIDDEN._replace(student=leaf), head, weights=weights).loss

    upstream = torch.ones(N)
    found = []
    for value in (1.0, torch.nan, torch.inf):
        upstream[2] = value
        leaf = x.clone().requires_grad_()
        head = Head(HEAD.weight.clone().requires_grad_(call not in (frozen, given)))
        masked(leaf, head).backward(upstream)
        found.append((leaf.grad, head.weight.grad))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert found[0][1] is None or torch.equal(other[1], found[0][1])


SCALE = 65536.0


@pytest.fixture
def half_operands(monkeypatch):
    """The matmuls' operands rounded to float16 as on a GPU, their sums in float32."""
    monkeypatch.setattr(problem, "operand_dtype", lambda *_: torch.float16)

    def project(hidden, weight, out, accumulate=False):
        product = hidden.float() @ weight.float().T
        return out.add_(product) if accumulate else out.copy_(product)

    monkeypatch.setattr(sources, "project", project)


def long_completions(tokens=64, spread=0.002):
    streams = make_hidden(tokens, 32, spread, dtype=torch.float16)
    head = make_head(257, 32, dtype=torch.float16)
    truth = true_purified(streams, (head, head), PurifiedConfig(), torch.ones(tokens))
    assert 0.1 < truth.loss.mean() / spread**2 < 10.0
    return streams, head, truth


@pytest.mark.parametrize("weight", [1.0, 1 / 1024, 1 / 65536])
@pytest.mark.parametrize("total", [False, True])
def test_float16_gradients_wait_for_the_loss_scale_with_all_their_digits(weight, total):
    """Rounded to float16 with a weight of 1/1024, before the scale, 18 % of the entries were 0."""
    streams, head, truth = long_completions()
    leaf, weights = streams.student.clone().requires_grad_(), torch.full((64,), weight)
    output = popsd.linear_purified_jsd(
        streams._replace(student=leaf), head, weights=weights, reduction="sum" if total else "none"
    )
    (output.loss.sum() * SCALE).backward()
    assert leaf.grad.dtype == torch.float16
    assert relative_l2(leaf.grad, truth.dhidden * (weight * SCALE)) < 5e-4


@pytest.mark.parametrize("lengths", [(1024, 1024), (1, 1023)])
def test_sequence_mean_in_float16(lengths):
    tokens = max(lengths)
    streams, head, truth = long_completions(2 * tokens)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    leaf = streams.student.view(2, tokens, 32).clone().requires_grad_()
    batch = HiddenStates(leaf, *(x.view(2, tokens, 32) for x in streams[1:]))
    loss, _ = PurifiedOPSDLoss(reduction="sequence_mean")(batch, head, mask=mask)
    (loss * SCALE).backward()
    share = mask / mask.sum(1, keepdim=True) / 2
    expected = truth.dhidden.view(2, tokens, 32) * share[..., None] * SCALE
    for i in range(2):
        assert relative_l2(leaf.grad[i], expected[i]) < 5e-4


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize(("weight", "scale"), [(1 / 4096, SCALE), (1.0, SCALE)])
def test_float16_operands_keep_small_weights_and_large_scales(half_operands, reduction, train_head, weight, scale):
    """On a GPU the logits' gradient is float16: no room for a weight of 1/4096 in it, nor for a scale of 65536."""
    streams, head, truth = long_completions(spread=0.02)
    leaf, own = streams.student.clone().requires_grad_(), head.weight.clone().requires_grad_(train_head)
    output = popsd.linear_purified_jsd(
        streams._replace(student=leaf), Head(own), head, weights=torch.full((64,), weight), reduction=reduction
    )
    (output.loss.sum() * scale).backward()
    assert relative_l2(leaf.grad.float() / scale, truth.dhidden * weight) < 1e-2
    if train_head:
        assert relative_l2(own.grad.float() / scale, truth.dweight * weight) < 1e-2
