"""Any call against the oracle of this folder, and relations that hold whatever the numbers. See conftest.py for how many."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from properties import oracle
from properties.judge import compute, expect, judge, same
from properties.strategies import DEFAULTS, Call, Head, calls, inputs

import popsd
from popsd.engine import operator


def share(of):
    """A test's part of the profile's examples; the parts sum to 1."""
    return settings(max_examples=max(1, round(of * settings.default.max_examples)))


PLAIN = Call(
    function="jsd", shape=(5,), vocab=5, padding=0, width=3, student_width=None, dtype="float32", seed=0, size=3.0,
    spread=0.3, pattern="normal", layout="contiguous", own=Head(), frozen=None, needs=frozenset(), total=False,
    weighted=False, sampled=False, workspace=None, decompose=False, telemetry=False, options={"beta": 0.5},
)  # fmt: skip
APART = replace(PLAIN, pattern="apart", spread=3.0, sampled=True)
purified = dict.fromkeys(["function"], "purified_jsd")


@share(0.67)
@given(calls())
# found by this test: -1e30 and 1e30 for what is infinite
@example(replace(APART, seed=61, vocab=8, **purified))
@example(replace(APART, seed=1, vocab=6, shape=(2, 3), options={"beta": 0.0, "entry_clip": 0.001}))
@example(
    replace(
        APART, seed=128, size=30.0, spread=0.3, telemetry=True, options={"beta": 0.5, "temperature": 0.5}, **purified
    )
)
# NaN of a mean over no entry
@example(replace(APART, seed=2886323998, vocab=2, shape=(3, 3), size=1000.0, spread=0.02, layout="strided", **purified))
@example(replace(APART, seed=2946389400, vocab=2, shape=(7,), spread=0.3, decompose=True, total=True, **purified))
# 1e-5 of a rounded normaliser, added to a row whose one likely entry is capped
@example(
    replace(
        PLAIN, seed=3476221970, shape=(6,), vocab=21, width=2, student_width=2, dtype="float16", size=30.0, spread=3.0,
        layout="expanded", own=Head(forbidden=True), frozen=Head(scale=1.7), function="linear_purified_jsd", telemetry=True,
        options={"beta": 0.0, "entry_clip": 0.001, "pmi_clip": 1e4},
    )
)  # fmt: skip
def test_torch_agrees_with_the_oracle(call):
    judge(call)


@pytest.mark.usefixtures("interpreter")
@share(0.03)
@given(calls(impl="triton"))
# a factor 1 + 1e-4 of the student's probabilities: a gain times log2(e) is rounded before it meets a logit of 4e4
@example(
    replace(
        PLAIN, function="linear_purified_jsd", shape=(2,), vocab=4, width=9, dtype="bfloat16", seed=831340538, size=1e4,
        own=Head(bias=True, scale=1.7), needs=frozenset({"bias", "weight"}), total=True, weighted=True, sampled=True,
        impl="triton", options={"beta": 1.0, "center": False},
    )
)  # fmt: skip
# logits that one sweep rounds and the other does not
@example(
    replace(
        PLAIN, function="linear_jsd", shape=(2,), vocab=40, dtype="bfloat16", seed=2573001211, size=1e4, pattern="impossible",
        own=Head(scale=1.7), frozen=Head(softcap=5.0), needs=frozenset({"weight", "student"}), weighted=True, sampled=True,
        workspace=0.002, impl="triton", options={"beta": 0.0, "entry_clip": 0.05},
    )
)  # fmt: skip
def test_triton_agrees_with_the_oracle(call):
    if call.full["pmi_clip"] == 1e4:  # refused
        call = replace(call, options=call.options | {"pmi_clip": 40.0})
    judge(replace(call, vocab=min(call.vocab, 40), shape=(min(call.tokens, 3),)))


@share(0.05)
@given(calls(functions=("jsd", "linear_jsd", "linear_purified_jsd")))
def test_a_student_that_is_its_target_has_no_loss(call):
    """From hidden states with teacher = reference: the target is the base."""
    call = replace(call, frozen=None, student_width=None, pattern="equal", total=False, weighted=False, decompose=False)
    call = replace(call, options=call.options | {"token_clip": None, "entry_clip": None})
    found = compute(call, inputs(call))
    size = max(call.size, 1.0) / call.full["temperature"]
    assert found.output.divergence.abs().max().item() <= 1e-6 * size if call.tokens else True
    for gradient in found.gradients.values():
        scale = call.size * max(call.tokens, 1) * 10 * call.own.scale
        assert torch.isfinite(gradient).all()
        assert not gradient.numel() or gradient.abs().max().item() <= 2e-6 * size * scale


@share(0.05)
@given(calls(functions=("jsd", "purified_jsd")))
def test_constants_of_a_row_do_not_matter_and_gradients_sum_to_zero(call):
    """Of given logits; the constant is a power of two, small enough to be added without rounding."""
    call = replace(call, size=3.0, dtype="float32", pattern="normal", needs=frozenset({"student"}), total=False)
    call = replace(call, layout="contiguous", options=call.options | {"entry_clip": None, "token_clip": None})
    first = inputs(call)
    quantised = {name: torch.round(x * 1024) / 1024 for name, x in first.streams.items()}
    shifted = {name: x + 16.0 * (i - 1) for i, (name, x) in enumerate(quantised.items())}
    results = []
    for streams in (quantised, shifted):
        given_inputs = replace_streams(first, streams)
        found = compute(call, given_inputs)
        gradient = found.gradients["student"]
        logarithms = found.output.divergence.detach() / 8  # an entry's gradient is a difference of numbers of that size
        bound = 1e-6 * (1 + gradient.abs().sum(-1) + logarithms.abs()) * (1 + first.upstream.abs())
        assert (gradient.sum(-1).abs() <= bound).all()
        results.append((found.output.divergence, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def replace_streams(given_inputs, streams):
    return type(given_inputs)(streams, *(getattr(given_inputs, x) for x in ("heads", "weights", "ids", "upstream")))


@share(0.05)
@given(calls())
def test_the_order_of_tokens_and_of_the_vocabulary_does_not_matter(call):
    call = replace(call, shape=(call.tokens,), size=min(call.size, 30.0), layout="contiguous", padding=0, total=False)
    thresholds = ("entry_clip", "token_clip", "plausibility", "tail_floor", "tail_cap")
    call = replace(call, options={name: x for name, x in call.options.items() if name not in thresholds})
    call = replace(call, decompose=False, telemetry=False)
    first = inputs(call)
    rng = np.random.default_rng(call.seed)
    tokens, words = (torch.from_numpy(rng.permutation(n)) for n in (call.tokens, call.vocab))
    moved = inputs(call)
    moved.streams = {name: x[tokens] if call.linear else x[tokens][:, words] for name, x in first.streams.items()}
    moved.heads = [tuple(None if x is None else x[words] for x in head) for head in first.heads]
    moved.weights = None if first.weights is None else first.weights[tokens]
    moved.ids, moved.upstream = None, first.upstream[tokens]
    a, b = compute(call, replace_ids(first)), compute(call, moved)
    close = {"rtol": 1e-3, "atol": 3e-6 * max(1.0, call.size) / call.full["temperature"]}
    torch.testing.assert_close(a.output.loss[tokens], b.output.loss, **close, equal_nan=True)
    if "student" in a.gradients and call.dtype == "float32" and call.full["beta"] != 1.0:
        x = a.gradients["student"][tokens]
        close["atol"] *= max(1.0, call.size) * 5
        torch.testing.assert_close(x if call.linear else x[:, words], b.gradients["student"], **close)


def replace_ids(given_inputs):
    given_inputs.ids = None
    return given_inputs


@share(0.1)
@given(calls())
def test_neither_chunks_nor_batches_matter(call):
    """A token's results are those of a call of its own, and the gradients of a head are the sums over such calls."""
    call = replace(call, size=min(call.size, 30.0), layout="contiguous", total=False)
    whole = inputs(call)
    found = compute(replace(call, workspace=1e-4), whole)
    flat = {name: x.reshape(call.tokens, x.shape[-1]) for name, x in whole.streams.items()}
    cut = call.tokens // 2
    parts = []
    for piece in (slice(0, cut), slice(cut, None)):
        some = type(whole)(
            {name: x[piece] for name, x in flat.items()},
            whole.heads,
            *(None if x is None else x.reshape(-1)[piece] for x in (whole.weights, whole.ids, whole.upstream)),
        )
        parts.append(compute(replace(call, workspace=None), some))
    size = max(1.0, call.size) / call.full["temperature"]
    joined = torch.cat([part.output.divergence for part in parts])
    kwargs = {"rtol": 1e-3, "atol": 3e-6 * size, "equal_nan": True}
    if call.full["entry_clip"] is None and call.full["plausibility"] is None:  # else an entry at the threshold
        torch.testing.assert_close(found.output.divergence.reshape(-1), joined, **kwargs)
        if call.dtype == "float32" and call.full["token_clip"] is None and call.full["beta"] != 1.0:
            for name, gradient in found.gradients.items():
                pieces = [part.gradients[name] for part in parts]
                other = torch.cat(pieces) if name == "student" else pieces[0] + pieces[1]
                kwargs["atol"] = 1e-5 * size * max(1.0, call.size) * max(call.tokens, 1)
                torch.testing.assert_close(gradient.reshape(other.shape), other, **kwargs)


@share(0.05)
@given(calls())
# inf of two heads that rule out different tokens
@example(
    replace(
        PLAIN, function="linear_purified_jsd", shape=(1, 2), vocab=6, width=4, seed=1294845913,
        own=Head(bias=True, forbidden=True), frozen=Head(bias=True, forbidden=True), options={"beta": 0.0, "token_clip": 0.01},
    )
)  # fmt: skip
def test_nan_stays_in_its_own_token(call):
    call = replace(call, layout="contiguous", total=False, needs=frozenset({"student"}), decompose=False)
    if call.tokens < 2:
        return
    call = replace(call, weighted=False, telemetry=False, options=call.options | {"check_finite": False})
    clean, dirty = inputs(call), inputs(call)
    for x in dirty.streams.values():
        x.reshape(call.tokens, x.shape[-1])[0] = torch.nan
    a, b = (compute(call, some) for some in (clean, dirty))
    loss, gradient = (x.reshape(call.tokens, -1) for x in (b.output.loss, b.gradients["student"]))
    assert torch.isnan(loss[0]).all() and torch.isnan(gradient[0, : call.vocab]).any()
    torch.testing.assert_close(loss[1:], a.output.loss.reshape(call.tokens, -1)[1:], rtol=0, atol=0, equal_nan=True)
    clean_gradient = a.gradients["student"].reshape(call.tokens, -1)
    torch.testing.assert_close(gradient[1:], clean_gradient[1:], rtol=0, atol=0, equal_nan=True)


def test_a_planted_error_is_found(monkeypatch):
    """0.05 % of a gradient, in the first examples of either profile: what cannot be seen is not proved."""
    original = operator._scaled
    monkeypatch.setattr(operator, "_scaled", lambda *some: original(*some) * 1.0005)
    property_of_ours = settings(
        max_examples=100, database=None, deadline=None, derandomize=True, phases=[Phase.generate]
    )(given(calls())(judge))
    with pytest.raises(AssertionError, match="gradient of"):
        property_of_ours()


def test_the_functions_beside_the_losses():
    """The target's logits, and a head's, over the patterns of values."""
    for pattern in ("normal", "ties", "one-hot", "impossible"):
        call = replace(PLAIN, function="purified_jsd", pattern=pattern, shape=(4,), vocab=17, spread=1.0)
        streams = [x for name, x in inputs(call).streams.items() if name != "student"]
        exact = oracle.target(*(x.double().numpy() for x in streams), DEFAULTS)
        found = popsd.purified_target_logits(*streams).double().numpy()
        wanted, value = (np.exp(oracle.log_softmax(x)) for x in (exact, found))
        same("target", value, wanted, 2e-5 * wanted + 1e-7)
    call = replace(PLAIN, function="linear_jsd", own=Head(bias=True, scale=1.7, softcap=5.0))
    hidden, (weight, bias) = inputs(call).streams["student"], inputs(call).heads[0]
    logits = popsd.head_logits(hidden, popsd.Head(weight, bias, logit_scale=1.7, softcap=5.0)).double().numpy()
    exact = oracle.project(*(x.double().numpy() for x in (hidden, weight, bias)), 1.7, 5.0)
    same("logits", logits, exact, 1e-5 * np.abs(exact) + 1e-6)
    centred = weight.double() - weight.double().mean(0)
    np.testing.assert_allclose(popsd.gram_matrix(popsd.Head(weight)), centred.T @ centred, rtol=1e-5, atol=1e-5)


def test_the_oracle_of_this_folder_agrees_with_its_own_gradient():
    """Central differences of its loss, for every divergence."""
    for beta in (0.0, 0.3, 1.0):
        call = replace(PLAIN, options={"beta": beta, "temperature": 1.3}, needs=frozenset({"student"}))
        given_inputs = inputs(call)
        given_inputs.streams = {name: x.double() for name, x in given_inputs.streams.items()}
        gradient, x = expect(call, given_inputs).gradients["student"], given_inputs.streams["student"]
        for i, j in ((0, 0), (3, 2)):
            losses = []
            for step in (1e-5, -1e-5):
                moved = x.clone()
                moved[i, j] += step
                some = replace_streams(given_inputs, given_inputs.streams | {"student": moved})
                losses.append((expect(call, some).results["loss"] * given_inputs.upstream.numpy()).sum())
            np.testing.assert_allclose((losses[0] - losses[1]) / 2e-5, gradient[i, j], rtol=1e-6, atol=1e-9)
