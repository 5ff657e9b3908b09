"""Bad input: the message names the argument, what was expected, what came, and the remedy; and it comes before any work."""

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, PurifiedOPSDLoss, linear_purified_jsd
from popsd.testing import make_head, make_hidden

N, V, D = 6, 23, 8
HIDDEN, HEAD = make_hidden(N, D, 0.3), make_head(V, D)


def with_value(stream: str, row: int, value: float) -> HiddenStates:
    x = getattr(HIDDEN, stream).clone()
    x[row, 2] = value
    return HIDDEN._replace(**{stream: x})


CASES = {
    "not a tuple": (
        lambda: linear_purified_jsd(list(HIDDEN), HEAD),
        TypeError,
        r"hidden: expected a popsd.HiddenStates",
    ),
    "missing stream": (
        lambda: linear_purified_jsd(HIDDEN._replace(base=None), HEAD),
        ValueError,
        r"hidden.base: expected a tensor; got None.*popsd.linear_jsd",
    ),
    "not a tensor": (
        lambda: linear_purified_jsd(HIDDEN._replace(teacher=[1.0]), HEAD),
        TypeError,
        r"hidden.teacher: expected a torch.Tensor; got list",
    ),
    "tokens differ": (
        lambda: linear_purified_jsd(HIDDEN._replace(reference=HIDDEN.reference[:-1]), HEAD),
        ValueError,
        r"hidden.reference: expected the tokens of hidden.student, \[6\]; got \[5\]",
    ),
    "rank": (
        lambda: linear_purified_jsd(HIDDEN._replace(student=torch.zeros(D)), HEAD),
        ValueError,
        r"hidden.student: expected shape \[N, D\] or \[B, T, D\]; got \[8\]",
    ),
    "integers": (
        lambda: linear_purified_jsd(HIDDEN._replace(base=HIDDEN.base.long()), HEAD),
        TypeError,
        r"hidden.base: expected float32, bfloat16 or float16; got torch.int64",
    ),
    "float64": (
        lambda: linear_purified_jsd(HIDDEN._replace(base=HIDDEN.base.double()), HEAD),
        TypeError,
        r"hidden.base: .*got torch.float64.*popsd.oracle",
    ),
    "device": (
        lambda: linear_purified_jsd(HIDDEN._replace(base=HIDDEN.base.to("meta")), HEAD),
        ValueError,
        r"hidden.base: expected device cpu like hidden.student; got meta. Move it",
    ),
    "width": (
        lambda: linear_purified_jsd(HIDDEN, make_head(V, D + 1)),
        ValueError,
        r"hidden.student: expected width 9 of student_head.weight \[23, 9\]; got \[6, 8\].*after the final norm",
    ),
    "no head": (
        lambda: linear_purified_jsd(HIDDEN, HEAD.weight),
        TypeError,
        r"student_head: expected a popsd.Head; got Tensor. Wrap",
    ),
    "head device": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, Head(HEAD.weight.to("meta"))),
        ValueError,
        r"frozen_head: expected device cpu like hidden.base; got meta",
    ),
    "vocabularies differ": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, make_head(V + 2, D)),
        ValueError,
        r"frozen_head: expected the student's vocabulary of 23 rows; got 25.*config.vocab_size",
    ),
    "vocab_size": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, config=PurifiedConfig(vocab_size=V + 1)),
        ValueError,
        r"config.vocab_size: expected at most the 23 rows there are; got 24",
    ),
    "NaN": (
        lambda: linear_purified_jsd(with_value("teacher", 4, float("nan")), HEAD),
        ValueError,
        r"hidden.teacher: expected finite values; got NaN or inf first in row 4 \(1 rows in all\).*weights = 0",
    ),
    "inf in a batch": (
        lambda: linear_purified_jsd(
            HiddenStates(*(x.view(2, 3, D) for x in with_value("base", 5, float("inf")))), HEAD
        ),
        ValueError,
        r"hidden.base: .*first in row \[1, 2\] of \[B, T\]",
    ),
    "weights": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, weights=torch.ones(N + 1)),
        ValueError,
        r"weights: expected shape \[6\], one entry per token; got \[7\]",
    ),
    "weights type": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, weights=[1.0] * N),
        TypeError,
        r"weights: expected a torch.Tensor of shape \[6\]; got list",
    ),
    "weights device": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, weights=torch.ones(N, device="meta")),
        ValueError,
        r"weights: expected device cpu; got meta",
    ),
    "weights NaN": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, weights=torch.full((N,), float("nan"))),
        ValueError,
        r"weights: expected finite numbers.*Mask tokens out with 0",
    ),
    "weights gradient": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, weights=torch.ones(N, requires_grad=True)),
        ValueError,
        r"weights: expected a tensor without gradient.*Detach",
    ),
    "token_ids dtype": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, token_ids=torch.zeros(N)),
        TypeError,
        r"token_ids: expected int64; got torch.float32",
    ),
    "token_ids range": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, token_ids=torch.full((N,), V)),
        ValueError,
        r"token_ids: expected entries in \[0, 23\) or -1 for none; got 23 … 23",
    ),
    "reduction": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, reduction="mean"),
        ValueError,
        r"reduction: expected 'none' or 'sum'; got 'mean'.*PurifiedOPSDLoss",
    ),
    "workspace": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, workspace_mib=0),
        ValueError,
        r"workspace_mib: expected a positive number",
    ),
    "impl": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, impl="cuda"),
        ValueError,
        r"impl: expected one of \['auto', 'tri",
    ),
    "strategy": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, strategy="fast"),
        ValueError,
        r"strategy: expected one of \['chunked', 'single_read', 'streaming'\]; got 'fast'",
    ),
    "strategy without Triton": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, strategy="streaming", impl="torch"),
        ValueError,
        r"strategy: 'streaming' needs Triton kernels: pass impl='triton'.*strategy='chunked'",
    ),
    "config": (
        lambda: linear_purified_jsd(HIDDEN, HEAD, config=popsd.DivergenceConfig()),
        TypeError,
        r"config: expected a popsd.PurifiedConfig; got DivergenceConfig",
    ),
    "logit vocabularies": (
        lambda: popsd.jsd(torch.zeros(N, V), torch.zeros(N, V + 1)),
        ValueError,
        r"student_logits: expected one non-empty vocabulary.*'target_logits': 24",
    ),
    "logits NaN": (
        lambda: popsd.jsd(torch.full((N, V), float("nan")), torch.zeros(N, V)),
        ValueError,
        r"student_logits: expected finite values; got NaN or inf first in row 0 \(6 rows",
    ),
    "beta": (
        lambda: PurifiedConfig(beta=1.5),
        ValueError,
        r"beta: expected a number in \[0, 1\]; got 1.5. 0 is forward KL",
    ),
    "beta NaN": (lambda: PurifiedConfig(beta=float("nan")), ValueError, r"beta: expected"),
    "pmi_beta": (
        lambda: PurifiedConfig(pmi_beta=0.0),
        ValueError,
        r"pmi_beta: expected a positive finite number; got 0",
    ),
    "pmi_clip": (lambda: PurifiedConfig(pmi_clip=-1.0), ValueError, r"pmi_clip: expected a positive"),
    "token_clip": (lambda: PurifiedConfig(token_clip=0.0), ValueError, r"token_clip: expected a positive"),
    "entry_clip": (lambda: PurifiedConfig(entry_clip=float("inf")), ValueError, r"entry_clip: expected a positive"),
    "temperature": (lambda: PurifiedConfig(temperature=0.0), ValueError, r"temperature: expected a positive"),
    "head rank": (
        lambda: Head(torch.zeros(3)),
        ValueError,
        r"Head.weight: expected a non-empty \[V, D\] matrix; got shape",
    ),
    "head type": (lambda: Head([[1.0]]), TypeError, r"Head.weight: expected a torch.Tensor"),
    "head dtype": (lambda: Head(torch.zeros(3, 2, dtype=torch.int8)), TypeError, r"Head.weight: .*dequantised first"),
    "head bias": (
        lambda: Head(torch.zeros(3, 2), torch.zeros(2)),
        ValueError,
        r"Head.bias: expected shape \[3\].*got \[2\]",
    ),
    "head bias device": (
        lambda: Head(torch.zeros(3, 2), torch.zeros(3, device="meta")),
        ValueError,
        r"Head.bias: expected device cpu like weight; got meta",
    ),
    "head scale": (
        lambda: Head(torch.zeros(3, 2), logit_scale=0.0),
        ValueError,
        r"Head.logit_scale: expected a positive",
    ),
    "head softcap": (lambda: Head(torch.zeros(3, 2), softcap=-1.0), ValueError, r"Head.softcap: expected a positive"),
    "loss_target": (
        lambda: PurifiedOPSDLoss(loss_target="pmi"),
        ValueError,
        r"loss_target: expected one of \['purified'",
    ),
    "module reduction": (lambda: PurifiedOPSDLoss(reduction="mean"), ValueError, r"reduction: expected one of"),
    "sequence_mean on flat tokens": (
        lambda: PurifiedOPSDLoss(reduction="sequence_mean")(HIDDEN, HEAD),
        ValueError,
        r"hidden: expected \[B, T, D\] for reduction='sequence_mean'",
    ),
    "mask": (
        lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, mask=torch.ones(N - 1)),
        ValueError,
        r"mask: expected shape \[6\].*got \[5\]",
    ),
    "num_items": (lambda: PurifiedOPSDLoss()(HIDDEN, HEAD, num_items=0), ValueError, r"num_items: expected a positive"),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_clear_errors(call, error, message, monkeypatch):
    monkeypatch.setattr("popsd.engine.losses.divergence", lambda *_: pytest.fail("work began before the check"))
    with pytest.raises(error, match=message):
        call()


def test_triton_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl: 'triton' expected tensors on a GPU.*TRITON_INTERPRET=1"):
        linear_purified_jsd(HIDDEN, HEAD, impl="triton")
    monkeypatch.setattr("popsd.engine.validation.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"impl: 'triton' needs Triton.*popsd\[triton\]"):
        linear_purified_jsd(HIDDEN, HEAD, impl="triton")


@pytest.mark.parametrize(
    ("strategy", "head", "options", "need"),
    [
        ("streaming", {"softcap": 5.0}, {}, "one difference"),
        ("streaming", {}, {"center": False}, "one difference"),
        ("streaming", {}, {"exact_difference": True}, "exact_difference=False"),
        ("single_read", {"bias": torch.zeros(V)}, {}, "heads without bias"),
    ],
)
def test_a_strategy_never_falls_back(strategy, head, options, need, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=f"strategy: '{strategy}' needs .*{need}"):
        linear_purified_jsd(
            HIDDEN, Head(HEAD.weight, **head), config=PurifiedConfig(**options), impl="triton", strategy=strategy
        )
    with pytest.raises(ValueError, match=r"needs (hidden states|the purified target|Triton)"):
        popsd.linear_jsd(
            HIDDEN.student,
            HEAD,
            HIDDEN.teacher,
            impl="triton" if strategy != "streaming" else "torch",
            strategy=strategy,
        )


def test_the_finite_check_can_be_switched_off_and_skips_masked_tokens():
    bad = with_value("student", 1, float("nan"))
    weights = torch.ones(N)
    weights[1] = 0
    assert torch.isfinite(linear_purified_jsd(bad, HEAD, weights=weights).loss).all()
    output = linear_purified_jsd(bad, HEAD, config=PurifiedConfig(check_finite=False))
    assert torch.isnan(output.loss).tolist() == [i == 1 for i in range(N)]


def test_the_finite_check_survives_an_overflowing_sum():
    huge = HIDDEN._replace(teacher=torch.full((N, D), 3e38))
    assert linear_purified_jsd(huge._replace(reference=huge.teacher), HEAD).loss.shape == (N,)


def test_logits_beyond_the_vocabulary_in_use_may_be_anything():
    """As in padding columns that nobody wrote."""
    student, target = torch.randn(2, 3, 9)
    padded = torch.nn.functional.pad(student, (0, 2), value=float("nan"))
    config = popsd.DivergenceConfig(vocab_size=9)
    found = popsd.jsd(padded, torch.nn.functional.pad(target, (0, 2)), config=config)
    torch.testing.assert_close(found.loss, popsd.jsd(student, target).loss)
