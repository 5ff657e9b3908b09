"""Arguments of the wrong type or with values that no loss survives: an error of ours, not one from inside torch."""

import pytest
import torch

import popsd
from popsd import Head, PurifiedConfig, PurifiedOPSDLoss, linear_purified_jsd
from popsd.testing import make_head, make_hidden

N, V, D = 6, 23, 8
HIDDEN, HEAD = make_hidden(N, D, 0.3), make_head(V, D)


def damaged(part: str, value: float) -> Head:
    """The head with one value of row 3 replaced."""
    weight, bias = HEAD.weight.clone(), torch.zeros(V)
    (weight[3] if part == "weight" else bias)[3] = value
    return Head(weight, bias)


CASES = {
    "module without streams": (
        lambda: PurifiedOPSDLoss()(list(HIDDEN), HEAD),
        TypeError,
        r"hidden: expected a popsd.HiddenStates; got list",
    ),
    "labels as mask": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, mask=torch.tensor([5, -100, 7, 1, 0, 2])),
        ValueError,
        r"mask: expected 0 and 1; got 5 among torch.int64. Of labels .* pass labels != -100",
    ),
    "negative weights as mask": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, mask=-torch.ones(N)),
        ValueError,
        r"mask: expected finite weights of at least 0; got -1.0",
    ),
    "NaN as mask": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, mask=torch.full((N,), float("nan"))),
        ValueError,
        r"mask: expected finite weights of at least 0; got nan",
    ),
    "mask with gradient": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, mask=torch.ones(N, requires_grad=True)),
        ValueError,
        r"mask: expected a tensor without gradient.*Detach it",
    ),
    "num_items NaN": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, num_items=float("nan")),
        ValueError,
        r"num_items: expected a positive count; got nan",
    ),
    "num_items negative": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, num_items=torch.tensor(-3)),
        ValueError,
        r"num_items: expected a count of at least 0; got -3",
    ),
    "num_items shape": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, num_items=torch.ones(2)),
        ValueError,
        r"num_items: expected one number; got a tensor of shape \[2\]",
    ),
    "num_items type": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, num_items="6"),
        TypeError,
        r"num_items: expected a number, a tensor or None; got str",
    ),
    "NaN in a head": (
        lambda: linear_purified_jsd(HIDDEN, damaged("weight", float("nan")), config=PurifiedConfig(check_finite=True)),
        ValueError,
        r"student_head.weight: expected finite values; got NaN or inf first in row 3 \(1 rows in all\)",
    ),
    "inf in a frozen head": (
        lambda: linear_purified_jsd(
            HIDDEN, HEAD, damaged("weight", float("inf")), config=PurifiedConfig(check_finite=True)
        ),
        ValueError,
        r"frozen_head.weight: expected finite values; got NaN or inf first in row 3",
    ),
    "infinite bias": (
        lambda: linear_purified_jsd(HIDDEN, damaged("bias", float("inf"))),
        ValueError,
        r"student_head.bias: expected finite values, or -inf for impossible tokens; got NaN or inf first in row 3",
    ),
    "NaN bias": (
        lambda: popsd.decompose(HIDDEN, damaged("bias", float("nan")), method="gram"),
        ValueError,
        r"student_head.bias: expected finite values",
    ),
    "fractional vocab_size": (
        lambda: PurifiedConfig(vocab_size=2.5),
        TypeError,
        r"vocab_size: expected a whole number of rows or None; got 2.5",
    ),
    "fractional vocab_size of a Gram matrix": (
        lambda: popsd.gram_matrix(HEAD, 2.5),
        ValueError,
        r"vocab_size: expected None or 1 to 23, the head's rows; got 2.5",
    ),
    "center": (lambda: PurifiedConfig(center="x"), TypeError, r"center: expected True or False; got 'x'"),
    "exact_difference": (
        lambda: PurifiedConfig(exact_difference=1),
        TypeError,
        r"exact_difference: expected True or False; got 1",
    ),
    "check_finite": (lambda: PurifiedConfig(check_finite=0), TypeError, r"check_finite: expected True or False; got 0"),
    "beta type": (lambda: PurifiedConfig(beta="0.5"), TypeError, r"beta: expected a number; got '0.5' of type str"),
    "beta tensor": (lambda: PurifiedConfig(beta=torch.tensor(0.5)), TypeError, r"beta: expected a number; got tensor"),
    "temperature type": (
        lambda: PurifiedConfig(temperature=True),
        TypeError,
        r"temperature: expected a number; got True of type bool",
    ),
    "plausibility type": (lambda: PurifiedConfig(plausibility="x"), TypeError, r"plausibility: expected a number"),
    "mask floor": (lambda: popsd.MaskConfig(floor="x"), TypeError, r"floor: expected a number"),
    "bias type": (
        lambda: Head(torch.zeros(3, 2), [0.0] * 3),
        TypeError,
        r"Head.bias: expected a torch.Tensor of shape \[3\]; got list",
    ),
    "bias dtype": (lambda: Head(torch.zeros(3, 2), torch.zeros(3).long()), TypeError, r"Head.bias: .*got torch.int64"),
    "sparse head": (
        lambda: Head(torch.zeros(3, 2).to_sparse()),
        TypeError,
        r"Head.weight: expected a dense tensor; got torch.sparse_coo. Convert it with .to_dense",
    ),
    "head scale type": (
        lambda: Head(torch.zeros(3, 2), logit_scale="2"),
        TypeError,
        r"Head.logit_scale: expected a number; got str",
    ),
    "head softcap type": (
        lambda: Head(torch.zeros(3, 2), softcap=torch.tensor(2.0)),
        TypeError,
        r"Head.softcap: expected a number; got Tensor",
    ),
    "workspace type": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, workspace_mib=torch.tensor(3.0)),
        TypeError,
        r"workspace_mib: expected a number of MiB or None; got Tensor",
    ),
    "sparse weights": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, weights=torch.ones(N).to_sparse()),
        TypeError,
        r"weights: expected a dense tensor; got torch.sparse_coo",
    ),
    "sparse stream": (
        lambda: popsd.jsd(torch.zeros(N, V).to_sparse(), torch.zeros(N, V)),
        TypeError,
        r"student_logits: expected a dense tensor",
    ),
    "telemetry": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, telemetry="yes"),
        TypeError,
        r"telemetry: expected True or False; got 'yes'",
    ),
    "logits of no head": (
        lambda: popsd.head_logits(HIDDEN.student, HEAD.weight),
        TypeError,
        r"head: expected a popsd.Head; got Tensor",
    ),
    "logits of no tensor": (
        lambda: popsd.head_logits([1.0], HEAD),
        TypeError,
        r"hidden: expected a torch.Tensor; got list",
    ),
    "token weights without what they read": (
        lambda: popsd.token_weights(
            popsd.MaskConfig(max_reference_fraction=1.0), student_entropy=torch.ones(N), target_entropy=torch.ones(N)
        ),
        ValueError,
        r"decomposition: expected, since a rule of the masks reads it; got None",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_clear_errors(call, error, message, monkeypatch):
    monkeypatch.setattr("popsd.engine.losses.divergence", lambda *_: pytest.fail("work began before the check"))
    with pytest.raises(error, match=message):
        call()


def test_rows_of_a_head_beyond_the_vocabulary_may_hold_anything():
    weight, bias = HEAD.weight.clone(), torch.zeros(V)
    weight[20:], bias[20:] = float("nan"), float("inf")
    bias[3] = -float("inf")
    config = PurifiedConfig(vocab_size=20, check_finite=True)
    assert torch.isfinite(linear_purified_jsd(HIDDEN, Head(weight, bias), config=config).loss).all()
