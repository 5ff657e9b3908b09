"""Token masks: each rule by hand, their product, gradients through the loss, and what happens when nothing is kept."""

import math
import warnings

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, MaskConfig, PurifiedOPSDLoss
from popsd.testing import make_head, make_hidden, relative_l2

B, T, D, V = 4, 9, 16, 101
HEAD = make_head(V, D)


def batch() -> HiddenStates:
    return HiddenStates(*(x.view(B, T, D) for x in make_hidden(B * T, D, 0.4)))


PARTS = popsd.decompose(batch(), HEAD)
PLAIN = popsd.linear_purified_jsd(batch(), HEAD)
IDS = torch.arange(B * T).view(B, T)


def middle(x: torch.Tensor) -> float:
    """A threshold that half of the tokens pass, away from any of them."""
    ordered = x.flatten().sort().values
    return float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())


RULES = {
    "reference_fraction": (
        {"max_reference_fraction": middle(PARTS.reference_fraction)},
        PARTS.reference_fraction <= middle(PARTS.reference_fraction),
    ),
    "centred": (
        {"max_reference_fraction": middle(PARTS.centred_reference_fraction), "signal": "centred"},
        PARTS.centred_reference_fraction <= middle(PARTS.centred_reference_fraction),
    ),
    "weighted": (
        {"min_cos_transferable": middle(PARTS.weighted_cos_total_transferable), "signal": "weighted"},
        PARTS.weighted_cos_total_transferable >= middle(PARTS.weighted_cos_total_transferable),
    ),
    "cosine": (
        {"min_cos_transferable": middle(PARTS.cos_total_transferable)},
        PARTS.cos_total_transferable >= middle(PARTS.cos_total_transferable),
    ),
    "student_entropy": (
        {"min_student_entropy": middle(PLAIN.student_entropy)},
        PLAIN.student_entropy >= middle(PLAIN.student_entropy),
    ),
    "target_entropy": (
        {"min_target_entropy": middle(PLAIN.target_entropy)},
        PLAIN.target_entropy >= middle(PLAIN.target_entropy),
    ),
    "skip_first": ({"skip_first": 3}, (torch.arange(T) >= 3).expand(B, T)),
    "protect": ({"protect_ids": (5, 17)}, (IDS != 5) & (IDS != 17)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_each_rule_keeps_what_it_says(rule, reduction):
    options, kept = RULES[rule]
    weights = torch.rand(B, T) + 0.5
    output = popsd.linear_purified_jsd(
        batch(), HEAD, masks=MaskConfig(**options), weights=weights, token_ids=IDS, reduction=reduction
    )
    expected = PLAIN.loss * weights * kept
    assert 0 < kept.sum() < B * T
    torch.testing.assert_close(output.weights, weights * kept)
    torch.testing.assert_close(output.loss, expected.sum() if reduction == "sum" else expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 1.0])
def test_a_top_share_is_of_the_tokens_that_count(share):
    weights = torch.ones(B, T)
    weights[1] = 0
    output = popsd.linear_purified_jsd(batch(), HEAD, masks=MaskConfig(top_student_entropy=share), weights=weights)
    count = math.ceil(share * 27 - 1e-9)
    best = PLAIN.student_entropy.masked_fill(weights == 0, -1.0).flatten().topk(count).indices
    expected = torch.zeros(B * T)
    expected[best] = 1
    assert torch.equal(output.weights, expected.view(B, T))


def test_rules_multiply_soft_and_floored():
    config = MaskConfig(min_student_entropy=1.0, min_target_entropy=0.5, skip_first=2, softness=0.3, floor=0.2)

    def soft(x):
        return 0.2 + 0.8 * torch.sigmoid(x / 0.3)

    expected = soft(PLAIN.student_entropy - 1.0) * soft(PLAIN.target_entropy - 0.5)
    expected = expected * torch.where(torch.arange(T) >= 2, 1.0, 0.2)
    torch.testing.assert_close(popsd.linear_purified_jsd(batch(), HEAD, masks=config).weights, expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_are_those_of_the_weights(reduction):
    """Frozen head and trained head alike, as if the mask's weights had been passed as weights."""
    masks, head = MaskConfig(top_target_entropy=0.4, floor=0.1), Head(HEAD.weight.clone().requires_grad_())
    leaf = batch().student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(batch()._replace(student=leaf), head, masks=masks, reduction=reduction)
    gradients = torch.autograd.grad(output.loss.sum(), (leaf, head.weight))
    again = popsd.linear_purified_jsd(batch()._replace(student=leaf), head, weights=output.weights)
    for a, b in zip(gradients, torch.autograd.grad(again.loss.sum(), (leaf, head.weight)), strict=True):
        assert relative_l2(a, b) < 1e-6
    frozen = popsd.linear_purified_jsd(batch()._replace(student=leaf), HEAD, masks=masks, reduction=reduction)
    assert relative_l2(torch.autograd.grad(frozen.loss.sum(), leaf)[0], gradients[0]) < 1e-6


def test_two_distributions_take_the_entropy_rules():
    hidden = batch()
    output = popsd.linear_jsd(hidden.student, HEAD, hidden.teacher, masks=MaskConfig(min_student_entropy=1.0))
    assert torch.equal(output.weights, (PLAIN.student_entropy >= 1.0).float())
    logits = [x @ HEAD.weight.T for x in hidden]
    for given in (
        popsd.jsd(*logits[:2], masks=MaskConfig(skip_first=4)),
        popsd.purified_jsd(*logits, masks=MaskConfig(skip_first=4)),
    ):
        assert given.weights.sum() == B * (T - 4)


def test_nothing_kept_is_zero_connected_and_said_once():
    masks, leaf = MaskConfig(min_student_entropy=50.0), batch().student.clone().requires_grad_()
    head = Head(HEAD.weight.clone().requires_grad_())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            loss = popsd.linear_purified_jsd(batch()._replace(student=leaf), head, masks=masks, reduction="sum").loss
    assert len(caught) == 1 and "kept share 0.000" in str(caught[0].message)
    loss.backward()
    assert loss == 0 and (leaf.grad == 0).all() and (head.weight.grad == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no token counts: nothing to warn of
        popsd.linear_purified_jsd(batch(), HEAD, masks=masks, weights=torch.zeros(B, T))
        empty = HiddenStates(*(torch.zeros(0, D) for _ in range(4)))
        popsd.linear_purified_jsd(empty, HEAD, masks=MaskConfig(top_student_entropy=0.5))


@pytest.mark.parametrize("loss_target", ["purified", "opsd"])
def test_the_module_masks_and_reports_the_kept_share(loss_target):
    mask = torch.arange(T) < torch.tensor([[9], [4], [1], [6]])
    late = torch.roll(mask, 2, dims=1) if loss_target == "purified" else mask  # completions that begin later in the row
    loss_fn = PurifiedOPSDLoss(loss_target=loss_target, masks=MaskConfig(skip_first=2))
    loss, metrics = loss_fn(batch(), HEAD, mask=late)
    plain = (
        popsd.linear_purified_jsd(batch(), HEAD)
        if loss_target == "purified"
        else popsd.linear_jsd(batch().student, HEAD, batch().teacher)
    )
    kept = late & (late.cumsum(1) > 2)
    assert relative_l2(loss, (plain.loss * kept).sum() / late.sum()) < 1e-6
    assert metrics["kept_share"] == kept.sum() / late.sum()
    assert metrics["tokens"] == late.sum()
    assert relative_l2(metrics["divergence"], plain.divergence[late].mean()) < 1e-5
    assert "kept_share" not in PurifiedOPSDLoss(loss_target=loss_target)(batch(), HEAD, mask=mask)[1]


@pytest.mark.filterwarnings("ignore:.*dont_inherit.*")
def test_masks_stay_in_the_callers_graph():
    masks, head = MaskConfig(top_student_entropy=0.5, max_reference_fraction=1.0, signal="centred"), HEAD

    def step(student, others):
        return popsd.linear_purified_jsd(HiddenStates(student, *others), head, masks=masks, reduction="sum").loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    student, *others = batch()
    torch.testing.assert_close(compiled(student, others), step(student, others))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_reference_fraction": 0.0}, r"max_reference_fraction: expected a number in \(0, inf\), or None; got 0.0"),
        ({"min_cos_transferable": 1.5}, r"min_cos_transferable: expected a number in \[-1, 1\]"),
        ({"top_student_entropy": 1.2}, r"top_student_entropy: expected a number in \(0, 1\]"),
        ({"min_target_entropy": float("nan")}, r"min_target_entropy"),
        ({"signal": "centered"}, r"signal: expected 'raw', 'centred' or 'weighted'; got 'centered'"),
        ({"skip_first": -1}, r"skip_first: expected a whole number"),
        ({"protect_ids": (-1,)}, r"protect_ids: expected token ids"),
        ({"floor": 1.0}, r"floor: expected a weight in \[0, 1\)"),
        ({"softness": -0.1}, r"softness: expected a number in \[0, inf\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**options)


def test_a_rule_without_what_it_reads_is_named():
    hidden = make_hidden(6, D, 0.4)
    with pytest.raises(ValueError, match=r"skip_first expected completions of shape \[B, T\], or positions"):
        popsd.linear_purified_jsd(hidden, HEAD, masks=MaskConfig(skip_first=1))
    with pytest.raises(ValueError, match=r"protect_ids expected token_ids"):
        popsd.linear_purified_jsd(hidden, HEAD, masks=MaskConfig(protect_ids=(1,)))
    with pytest.raises(ValueError, match=r"need the streams of a purified loss"):
        popsd.linear_jsd(hidden.student, HEAD, hidden.teacher, masks=MaskConfig(min_cos_transferable=0.0))
    with pytest.raises(ValueError, match=r"decompose: expected True, since the masks read the raw"):
        popsd.linear_purified_jsd(hidden, HEAD, masks=MaskConfig(min_cos_transferable=0.0), decompose="gram")
    with pytest.raises(TypeError, match=r"masks: expected a popsd.MaskConfig"):
        popsd.linear_purified_jsd(hidden, HEAD, masks={"floor": 0.1})
    with pytest.raises(TypeError, match=r"positions: expected int64"):
        popsd.linear_purified_jsd(hidden, HEAD, positions=torch.zeros(6), masks=MaskConfig(skip_first=1))
    kept = popsd.linear_purified_jsd(hidden, HEAD, masks=MaskConfig(skip_first=2), positions=torch.arange(6) % 3)
    assert kept.weights.tolist() == [0, 0, 1, 0, 0, 1]
