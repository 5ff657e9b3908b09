"""Eq. 4 against the oracle, alone and beside the loss."""

import pytest
import torch

import popsd
from popsd import Head, HiddenStates, PurifiedConfig, oracle
from popsd.testing import make_head, make_hidden, relative_l2


@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.5}, {"softcap": 6.0}])
@pytest.mark.parametrize("temperature", [1.0, 1.4])
@pytest.mark.parametrize("separate", [False, True])
def test_decompose_matches_the_oracle(head, temperature, separate):
    hidden, config = make_hidden(50, 24, 0.4), PurifiedConfig(temperature=temperature, vocab_size=190)
    student_head = Head(make_head(211, 24).weight, torch.randn(211), **head)
    frozen_head = make_head(211, 24, seed=8) if separate else None
    expected = oracle.decompose(
        oracle.head_logits(hidden.student, student_head),
        *(oracle.head_logits(x, frozen_head or student_head) for x in (hidden.teacher, hidden.reference)),
        config,
    )
    actual = popsd.decompose(hidden._replace(base=None), student_head, frozen_head, config=config, workspace_mib=0.1)
    beside = popsd.linear_purified_jsd(hidden, student_head, frozen_head, config=config, decompose=True)
    for name in expected._fields:
        assert relative_l2(getattr(actual, name), getattr(expected, name)) < 1e-4, name
        assert relative_l2(getattr(beside.decomposition, name), getattr(expected, name)) < 1e-4, name
    plain = popsd.linear_purified_jsd(hidden, student_head, frozen_head, config=config)
    assert relative_l2(beside.loss, plain.loss) < 1e-5  # the general path computes the same loss


def gram_case(seed=0, dtype=torch.float32, **head):
    bias = torch.randn(211)
    bias[30:50] = -torch.inf
    hidden = make_hidden(50, 24, 0.4, seed=seed, dtype=dtype)
    return hidden, Head(make_head(211, 24, dtype=dtype).weight, bias.to(dtype), **head)


def truth_of(hidden, head, config):
    return oracle.decompose(*(oracle.head_logits(hidden[i], head) for i in (0, 2, 3)), config)


@pytest.mark.parametrize("temperature", [1.0, 1.4])
@pytest.mark.parametrize("spread", [1e-3, 0.4])
def test_the_quadratic_form_matches_the_oracle(temperature, spread):
    """Bias of -inf, padding rows, scale and temperature; alone, beside the loss, and in a masked token of NaN."""
    hidden, head = gram_case(logit_scale=0.5)
    hidden = HiddenStates(*(hidden.base + spread * x for x in make_hidden(50, 24, 1.0, seed=3)))
    config = PurifiedConfig(temperature=temperature, vocab_size=190)
    expected = truth_of(hidden, head, config)
    alone = popsd.decompose(hidden._replace(base=None), head, config=config, method="gram")
    hidden.teacher[7] = float("nan")
    weights = torch.ones(50).index_fill(0, torch.tensor([7]), 0.0)
    beside = popsd.linear_purified_jsd(hidden, head, config=config, decompose="gram", weights=weights)
    rest = weights != 0
    for name in popsd.Decomposition._fields:
        if name.startswith("centred_"):
            assert relative_l2(getattr(alone, name), getattr(expected, name)) < 2e-6, name
            assert relative_l2(getattr(beside.decomposition, name)[rest], getattr(expected, name)[rest]) < 2e-6, name
        else:
            assert getattr(alone, name) is None is getattr(beside.decomposition, name)


def test_the_quadratic_form_knows_the_raw_fields_by_their_normalisers():
    hidden, head = gram_case()
    logits = [oracle.head_logits(hidden[i], head) for i in (0, 2, 3)]
    expected = oracle.decompose(*logits, PurifiedConfig())
    normalisers = [x.logsumexp(-1).float() for x in logits]
    actual = popsd.decompose(hidden, head, method="gram", log_normalisers=normalisers)
    for name in popsd.Decomposition._fields[:12]:
        assert relative_l2(getattr(actual, name), getattr(expected, name)) < 1e-5, name
    assert actual.weighted_total_norm is None


@pytest.mark.parametrize("method", ["logits", "gram"])
def test_bfloat16_states(method):
    """Against the oracle on the same 16-bit inputs: nothing is lost but what float32 products lose."""
    hidden, head = gram_case(dtype=torch.bfloat16)
    expected, actual = truth_of(hidden, head, PurifiedConfig()), popsd.decompose(hidden, head, method=method)
    for name, value in actual._asdict().items():
        if value is not None:
            assert relative_l2(value, getattr(expected, name)) < 1e-4, name


@pytest.mark.parametrize("call", ["alone", "loss", "module", "opsd"])
def test_a_caller_may_keep_the_gram_matrix(call, monkeypatch):
    hidden, head = gram_case(logit_scale=0.5)
    config = PurifiedConfig(vocab_size=190)

    def centred(**options):
        if call == "alone":
            return popsd.decompose(hidden, head, config=config, method="gram", **options).centred_total_norm.mean()
        if call == "loss":
            output = popsd.linear_purified_jsd(hidden, head, config=config, decompose="gram", **options)
            return output.decomposition.centred_total_norm.mean()
        module = popsd.PurifiedOPSDLoss(config, loss_target="opsd" if call == "opsd" else "purified")
        return module(hidden, head, decompose="gram", **options)[1]["decomposition/centred_total_norm"]

    expected, gram = centred(), popsd.gram_matrix(head, 190)
    assert gram.shape == (24, 24) and gram.dtype == torch.float32 and not gram.requires_grad
    monkeypatch.setattr("popsd.engine.chunks.decomposition.centred_gram", lambda *_: pytest.fail("formed again"))
    torch.testing.assert_close(centred(gram=gram), expected)
    torch.testing.assert_close(centred(gram=4.0 * gram), 2.0 * expected)


@pytest.mark.parametrize(
    ("gram", "error", "message"),
    [
        (torch.zeros(23, 23), ValueError, r"gram: expected float32 of shape \[24, 24\] on cpu.*popsd.gram_matrix"),
        (torch.zeros(24, 24).double(), ValueError, r"gram: expected float32 .*got torch.float64"),
        ([[0.0]], TypeError, r"gram: expected a torch.Tensor from popsd.gram_matrix; got list"),
    ],
)
def test_a_gram_matrix_that_does_not_fit_is_refused(gram, error, message):
    hidden, head = gram_case()
    with pytest.raises(error, match=message):
        popsd.linear_purified_jsd(hidden, head, decompose="gram", gram=gram)
    with pytest.raises(error, match=message):
        popsd.decompose(hidden, head, method="gram", gram=gram)


def test_a_gram_matrix_that_nobody_reads_is_refused():
    hidden, head = gram_case()
    gram = popsd.gram_matrix(head)
    for decompose in (False, True, "logits"):
        with pytest.raises(ValueError, match=r"gram: expected None unless decompose is 'gram' or a mask needs it"):
            popsd.linear_purified_jsd(hidden, head, decompose=decompose, gram=gram)
    with pytest.raises(ValueError, match=r"gram: expected None unless method is 'gram'"):
        popsd.decompose(hidden, head, gram=gram)
    with pytest.raises(ValueError, match=r"gram: expected None unless decompose is 'gram'"):
        popsd.PurifiedOPSDLoss(loss_target="opsd")(hidden, head, gram=gram)
    masks = popsd.MaskConfig(signal="centred", max_reference_fraction=0.9)
    kept = popsd.linear_purified_jsd(hidden, head, masks=masks, gram=gram)
    assert torch.equal(kept.weights, popsd.linear_purified_jsd(hidden, head, masks=masks).weights)
    with pytest.raises(ValueError, match=r"vocab_size: expected None or 1 to 211"):
        popsd.gram_matrix(head, 212)
    with pytest.raises(TypeError, match=r"head: expected a popsd.Head"):
        popsd.gram_matrix(head.weight)


@pytest.mark.parametrize("loss_target", ["purified", "opsd"])
def test_the_module_logs_the_centred_fields_alone(loss_target):
    hidden, head = gram_case()
    _, metrics = popsd.PurifiedOPSDLoss(loss_target=loss_target)(hidden, head, decompose="gram")
    logged = {name.removeprefix("decomposition/") for name in metrics if name.startswith("decomposition/")}
    assert logged == {name for name in popsd.Decomposition._fields if name.startswith("centred_")}


def test_what_the_quadratic_form_cannot_do_is_refused():
    hidden, head = gram_case()
    other = make_head(211, 24, seed=8)
    with pytest.raises(ValueError, match=r"decompose: 'gram' needs one head for .*Otherwise use 'logits'"):
        popsd.linear_purified_jsd(hidden, head, other, decompose="gram")
    with pytest.raises(ValueError, match=r"method: 'gram' needs a head without soft cap"):
        popsd.decompose(hidden, Head(head.weight, softcap=6.0), method="gram")
    with pytest.raises(ValueError, match=r"decompose: 'gram' needs hidden states and a head"):
        popsd.purified_jsd(*(x @ head.weight.T for x in hidden), decompose="gram")
    with pytest.raises(ValueError, match=r"decompose: expected one of \['logits', 'gram'\]; got 'moments'"):
        popsd.linear_purified_jsd(hidden, head, decompose="moments")
    with pytest.raises(ValueError, match=r"log_normalisers: expected None with method='logits'"):
        popsd.decompose(hidden, head, log_normalisers=[torch.zeros(50)] * 3)
    with pytest.raises(ValueError, match=r"log_normalisers: expected three tensors"):
        popsd.decompose(hidden, head, method="gram", log_normalisers=[torch.zeros(50)])


def test_impossible_tokens_leave_every_field():
    """-inf in one stream alone: the entry counts nowhere, as in the oracle."""
    logits = [torch.randn(6, 40) for _ in range(4)]
    logits[0][:, 3], logits[2][:, 5], logits[3][:, 7] = -torch.inf, -torch.inf, -torch.inf
    expected = oracle.decompose(logits[0], logits[2], logits[3], PurifiedConfig())
    actual = popsd.purified_jsd(*logits, decompose=True).decomposition
    for name in expected._fields:
        assert relative_l2(getattr(actual, name), getattr(expected, name)) < 1e-4, name


@pytest.mark.parametrize("beta_dtype", [(0.0, torch.float32), (0.5, torch.bfloat16)])
@pytest.mark.parametrize(
    "options",
    [{}, {"pmi_clip": None}, {"pmi_clip": 0.5, "temperature": 1.3, "vocab_size": 190}, {"plausibility": 0.05}],
    ids=["default", "unclipped", "tight", "plausibility"],
)
@pytest.mark.parametrize("head_options", [{}, {"logit_scale": 0.5}, {"softcap": 6.0}])
def test_purification_telemetry_matches_the_oracle(beta_dtype, options, head_options):
    beta, dtype = beta_dtype
    hidden, config = make_hidden(50, 24, 0.4, dtype=dtype), PurifiedConfig(beta=beta, **options)
    head = Head(make_head(211, 24, dtype=dtype).weight, torch.randn(211).to(dtype), **head_options)
    logits = [oracle.head_logits(x, head) for x in hidden]
    expected = oracle.purification(*logits[1:], config)
    output = popsd.linear_purified_jsd(hidden, head, config=config, telemetry=True, workspace_mib=0.1)
    assert output.purification._fields == expected._fields
    for name, value in output.purification._asdict().items():
        if getattr(expected, name).any():
            assert relative_l2(value, getattr(expected, name)) < 1e-4, name
        else:
            assert not value.any(), name
    plain = popsd.linear_purified_jsd(hidden, head, config=config)
    assert plain.purification is None and relative_l2(output.loss, plain.loss) < 1e-5
    shaped = HiddenStates(*(x.view(5, 10, 24) for x in hidden))
    both = popsd.linear_purified_jsd(shaped, head, config=config, telemetry=True, decompose=True)
    assert both.purification.mass_moved.shape == (5, 10) == both.decomposition.total_norm.shape
    metrics = popsd.PurifiedOPSDLoss(config)(shaped, head, telemetry=True)[1]
    assert relative_l2(metrics["purification/mass_moved"], expected.mass_moved.mean()) < 1e-4
    with pytest.raises(ValueError, match=r"telemetry: expected False for loss_target='opsd'"):
        popsd.PurifiedOPSDLoss(config, loss_target="opsd")(shaped, head, telemetry=True)


@pytest.mark.parametrize("wanted", [{"decompose": True, "telemetry": True}, {"decompose": "gram"}])
def test_diagnostics_stay_in_the_callers_graph(wanted):
    head = make_head(31, 8)

    def step(*streams):
        output = popsd.linear_purified_jsd(HiddenStates(*streams), head, **wanted)
        return output.loss, output.decomposition.centred_total_norm, output.purification

    torch._dynamo.reset()
    streams = make_hidden(6, 8, 0.4)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for a, b in zip(compiled(*streams), step(*streams), strict=True):
        torch.testing.assert_close(a, b)


def test_batched_and_from_logits():
    hidden, head = make_hidden(12, 8, 0.4), make_head(31, 8)
    flat = popsd.decompose(hidden, head)
    batched = popsd.decompose(HiddenStates(*(x.view(3, 4, 8) for x in hidden)), head)
    logits = [x @ head.weight.T for x in hidden]
    given = popsd.purified_jsd(*logits, decompose=True).decomposition
    for a, b, c in zip(flat, batched, given, strict=True):
        assert b.shape == (3, 4)
        torch.testing.assert_close(b.flatten(), a)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_identical_policies_decompose_into_zeros_not_nan(seed):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    parts = popsd.decompose(HiddenStates(x, x, x, x), make_head(31, 8))
    assert all((field == 0).all() for field in parts)


def test_the_quadratic_form_near_the_null_space_is_off_by_what_is_documented():
    """A difference that the head nearly ignores: relative to itself its norm has few digits, and "logits" has them all."""
    hidden, head = make_hidden(50, 24, 0.4), make_head(97, 24)
    centred = (head.weight - head.weight.mean(0)).double()
    values, directions = torch.linalg.eigh(centred.T @ centred)
    weak = centred - (centred @ directions[:, :4]) @ directions[:, :4].T * (
        1 - 1e-4
    )  # four directions 1e4 times weaker
    head = Head(weak.float())
    step = torch.randn(50, 4, dtype=torch.float64) @ directions[:, :4].T
    hidden = hidden._replace(teacher=hidden.student + step.float())
    exact, logits = (f(hidden, head) for f in (lambda h, w: truth_of(h, w, PurifiedConfig()), popsd.decompose))
    gram = popsd.decompose(hidden, head, method="gram")
    bound = 1e-6 * float(values[-1]) * step.norm(dim=-1) ** 2
    error = (gram.centred_total_norm.double() ** 2 - exact.centred_total_norm**2).abs()
    assert (error <= bound).all()
    assert relative_l2(gram.centred_total_norm, exact.centred_total_norm) > 1e-3, "as badly conditioned as it should be"
    assert relative_l2(logits.centred_total_norm, exact.centred_total_norm) < 3e-3
