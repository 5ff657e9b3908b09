"""PurifiedOPSDLoss: averaging, masks, invariance to the micro-batch split, metrics."""

import pytest
import torch

import popsd
from popsd import HiddenStates, PurifiedConfig, PurifiedOPSDLoss
from popsd.testing import make_head, make_hidden, relative_l2

B, T, D, V = 4, 9, 16, 101
HEAD = make_head(V, D)
MASK = torch.arange(T) < torch.tensor([[9], [4], [1], [6]])


def batch(spread: float = 0.4) -> HiddenStates:
    return HiddenStates(*(x.view(B, T, D) for x in make_hidden(B * T, D, spread)))


def test_token_mean_is_the_mean_over_the_mask():
    hidden, config = batch(), PurifiedConfig(beta=0.3)
    per_token = popsd.linear_purified_jsd(hidden, HEAD, config=config)
    loss, metrics = PurifiedOPSDLoss(config)(hidden, HEAD, mask=MASK)
    assert relative_l2(loss, per_token.loss[MASK].mean()) < 1e-6
    assert metrics["tokens"] == MASK.sum() == 20
    for name in ("divergence", "student_entropy", "target_entropy", "student_kl", "target_kl", "argmax_agreement"):
        assert relative_l2(metrics[name], getattr(per_token, name)[MASK].mean()) < 1e-5, name


def test_sequence_mean_weighs_every_completion_alike():
    hidden = batch()
    per_token = popsd.linear_purified_jsd(hidden, HEAD).loss
    expected = torch.stack([per_token[i][MASK[i]].mean() for i in range(B)]).mean()
    loss, _ = PurifiedOPSDLoss(reduction="sequence_mean")(hidden, HEAD, mask=MASK)
    assert relative_l2(loss, expected) < 1e-6
    empty = MASK.clone()
    empty[2] = False
    expected = torch.stack([per_token[i][MASK[i]].mean() for i in (0, 1, 3)]).mean()
    assert relative_l2(PurifiedOPSDLoss(reduction="sequence_mean")(hidden, HEAD, mask=empty)[0], expected) < 1e-6


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("loss_target", ["purified", "opsd"])
def test_the_micro_batch_split_does_not_matter(reduction, loss_target):
    hidden, loss_fn = batch(), PurifiedOPSDLoss(reduction=reduction, loss_target=loss_target)
    num_items = MASK.sum() if reduction == "token_mean" else B
    results = []
    for split in ([4], [1, 3], [2, 2], [1, 1, 1, 1]):
        leaf, head = hidden.student.clone().requires_grad_(), popsd.Head(HEAD.weight.clone().requires_grad_())
        total, start = 0.0, 0
        for size in split:
            rows = slice(start, start + size)
            streams = HiddenStates(leaf[rows], *(x[rows] for x in hidden[1:]))
            loss, _ = loss_fn(streams, head, mask=MASK[rows], num_items=num_items)
            loss.backward()
            total, start = total + loss.detach(), start + size
        results.append((total, leaf.grad, head.weight.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_l2(b, a) < 1e-6


def test_opsd_is_the_teacher_as_target_and_needs_no_reference():
    hidden, config = batch(), PurifiedConfig(beta=0.0)
    expected = popsd.linear_jsd(hidden.student, HEAD, hidden.teacher, config=config).loss.mean()
    streams = HiddenStates(hidden.student, None, hidden.teacher, None)
    loss, metrics = PurifiedOPSDLoss(config, loss_target="opsd")(streams, HEAD)
    assert relative_l2(loss, expected) < 1e-6
    assert "decomposition/total_norm" not in metrics


@pytest.mark.parametrize("loss_target", ["purified", "opsd"])
def test_decomposition_and_token_metrics(loss_target):
    hidden, ids = batch(), torch.arange(B * T).view(B, T)
    _, metrics = PurifiedOPSDLoss(loss_target=loss_target)(hidden, HEAD, mask=MASK, token_ids=ids, decompose=True)
    parts = popsd.decompose(hidden, HEAD)
    for name, value in parts._asdict().items():
        assert relative_l2(metrics[f"decomposition/{name}"], value[MASK].mean()) < 1e-5
    log_p = torch.log_softmax(hidden.student @ HEAD.weight.T, -1).gather(-1, ids[..., None])[..., 0]
    assert relative_l2(metrics["token_logprob"], log_p[MASK].mean()) < 1e-5
    assert all(not x.requires_grad and x.ndim == 0 for x in metrics.values())


def test_nothing_to_learn_from_is_a_finite_zero_with_a_graph():
    leaf = batch().student.clone().requires_grad_()
    loss, metrics = PurifiedOPSDLoss()(batch()._replace(student=leaf), HEAD, mask=torch.zeros(B, T, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and metrics["tokens"] == 0 and (leaf.grad == 0).all()
    assert all(torch.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_weights_that_sum_to_less_than_one_are_weights_all_the_same(reduction):
    hidden, loss_fn = batch(), PurifiedOPSDLoss(reduction=reduction)
    expected, metrics = loss_fn(hidden, HEAD, mask=MASK)
    for factor in (0.01, 1e-12, 3.0):
        loss, other = loss_fn(hidden, HEAD, mask=MASK * factor)
        assert relative_l2(loss, expected) < 1e-6
        assert all(torch.equal(other[name], metrics[name]) for name in metrics)


@pytest.mark.parametrize("items", [0.25, 20, 1e-3])
def test_the_divisor_is_what_was_given_as_a_number_or_a_tensor(items):
    hidden, loss_fn = batch(), PurifiedOPSDLoss()
    total = popsd.linear_purified_jsd(hidden, HEAD).loss[MASK].sum()
    for num_items in (items, torch.tensor(items), torch.tensor([items], dtype=torch.float64)):
        loss, _ = loss_fn(hidden, HEAD, mask=MASK, num_items=num_items)
        assert loss.ndim == 0 and relative_l2(loss, total / items) < 1e-6
    nothing, _ = loss_fn(hidden, HEAD, mask=MASK & False, num_items=torch.tensor(0))
    assert nothing == 0


def test_a_mask_is_compiled_whole():
    """A graph has one shape: what is dropped in eager mode gets weight 0 there, also where it holds NaN."""
    dirty = HiddenStates(*(x.masked_fill(~MASK[..., None], torch.nan) for x in batch()))
    modules = {
        "tokens": PurifiedOPSDLoss(impl="torch"),
        "sequences": PurifiedOPSDLoss(reduction="sequence_mean", masks=popsd.MaskConfig(top_student_entropy=0.5)),
        "teacher": PurifiedOPSDLoss(loss_target="opsd", masks=popsd.MaskConfig(skip_first=1)),
    }
    for name, loss_fn in modules.items():

        def step(student, mask, loss_fn=loss_fn, name=name):
            return loss_fn(dirty._replace(student=student), HEAD, mask=mask, decompose=name == "teacher")

        results = []
        for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = dirty.student.clone().requires_grad_()
            loss, metrics = call(leaf, MASK)
            loss.backward()
            results.append([loss, leaf.grad, *metrics.values()])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


def test_a_token_on_which_student_and_teacher_agree_does_not_decide_the_mean_fraction():
    hidden = batch()
    student = hidden.student.clone()
    student[0, 3] = hidden.teacher[0, 3]  # ‖Δ_total‖ is 0 there but for rounding
    student[0, 3, 0] += 1e-6
    hidden = hidden._replace(student=student)
    parts = popsd.decompose(hidden, HEAD)
    assert parts.weighted_reference_fraction.max() > 1e3
    _, metrics = PurifiedOPSDLoss()(hidden, HEAD, decompose=True)
    for name in ("reference_fraction", "centred_reference_fraction", "weighted_reference_fraction"):
        of_the_others = getattr(parts, name).flatten()[torch.arange(B * T) != 3]
        assert of_the_others.max() < 10.0
        expected = (of_the_others.sum() + 10.0) / (B * T)
        assert relative_l2(metrics[f"decomposition/{name}"], expected) < 1e-5


def test_cosines_stay_within_one():
    """Of parallel differences, rounded, they were 1.0000002."""
    hidden = make_hidden(200, D, 0.4)
    parallel = hidden._replace(reference=2.0 * hidden.teacher - hidden.student)
    for parts in (popsd.decompose(parallel, HEAD), popsd.decompose(parallel, HEAD, method="gram")):
        for name, value in parts._asdict().items():
            assert value is None or "cos" not in name or value.abs().max() <= 1.0
    logits = [popsd.oracle.head_logits(x, HEAD) for x in parallel]
    parts = popsd.oracle.decompose(logits[0], logits[2], logits[3], PurifiedConfig())
    assert max(x.abs().max() for name, x in parts._asdict().items() if "cos" in name) <= 1.0


@pytest.mark.parametrize("ids", [torch.zeros(2, 7), torch.zeros(4, 2), torch.zeros(2, 3)])
def test_ids_of_other_tokens_than_the_masks_are_refused(ids):
    """With a mask the ids of the counted tokens are picked by position, so that ids of another shape would be mispaired."""
    hidden = HiddenStates(*torch.randn(4, 2, 4, HEAD.weight.shape[1]))
    with pytest.raises(ValueError, match=r"token_ids: expected shape \[2, 4\]"):
        PurifiedOPSDLoss()(hidden, HEAD, mask=torch.ones(2, 4, dtype=torch.bool), token_ids=ids.long())


def test_a_target_that_is_not_registered_is_refused_at_once():
    with pytest.raises(ValueError, match=r"config.target: expected one of .*; got 'sharpend'"):
        PurifiedOPSDLoss(popsd.TargetConfig(target="sharpend", numbers=(1.0,)))
