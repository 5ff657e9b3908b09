"""A drawn call made, and judged by the oracle: what float32 may be off by is measured on the oracle itself.

The oracle is run again with every logit off by a rounding and every threshold by a little. An answer may be off by a few times
what that does, by 2e-5 of itself, and by a floor of the size of rounded probabilities. At logits of deviation 3 the first is
below 1e-5 of a gradient; at 1e4 it is what float32 can know.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from properties import oracle
from properties.strategies import Call, Inputs, inputs

import popsd

ROUNDING = 2.0**-23
TIMES, RELATIVE, FLOOR = 10.0, 2e-5, 1e-6
GRADIENT_FLOOR = 5e-7
PRECISION = {"float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}
SMALLEST = {"float32": 0.0, "bfloat16": 0.0, "float16": 6e-8}
"""Of the 16-bit dtype of a gradient: its last digit, relative, and where it has subnormal numbers."""
THRESHOLDS = ("token_clip", "entry_clip", "plausibility", "tail_floor")


class Found(NamedTuple):
    output: Any
    gradients: dict[str, torch.Tensor]


class Expected(NamedTuple):
    results: dict[str, np.ndarray]
    """Per token [N]."""
    gradients: dict[str, np.ndarray]
    unsure: np.ndarray
    """[N] bool: a token with an entry that one policy cannot sample, and whose probability by the other is 0 in float64 and not
    in mathematics. Under ``entry_clip`` such an entry counts from a probability of 1e-27 on, see `DivergenceConfig`."""
    largest: float
    """Of the logits over the temperature."""


def compute(call: Call, given: Inputs) -> Found:
    leaves = {"student": given.streams["student"].detach().requires_grad_("student" in call.needs)}
    heads = []
    for i, (kind, (weight, bias)) in enumerate(zip([call.own, call.frozen], given.heads, strict=False)):
        weight, bias = (None if x is None else x.clone() for x in (weight, bias))
        if i == 0:
            for name, x in (("weight", weight), ("bias", bias)):
                if x is not None and name in call.needs:
                    leaves[name] = x.requires_grad_()
        heads.append(popsd.Head(weight, bias, logit_scale=kind.scale, softcap=kind.softcap))
    streams = [leaves["student"], *list(given.streams.values())[1:]]
    arguments: list[Any] = [popsd.HiddenStates(*streams), *heads] if call.linear and call.purified else streams
    if call.function == "linear_jsd":
        arguments = [streams[0], heads[0], streams[1], *heads[1:]]
    kind = popsd.PurifiedConfig if call.purified else popsd.DivergenceConfig
    more = {"decompose": call.decompose, "telemetry": call.telemetry} if call.purified else {}
    output = getattr(popsd, call.function)(
        *arguments,
        config=kind(vocab_size=call.vocab, **call.options),
        weights=given.weights,
        token_ids=given.ids,
        reduction="sum" if call.total else "none",
        impl=call.impl,
        workspace_mib=call.workspace,
        **more,
    )
    wanted = [name for name, x in leaves.items() if x.requires_grad]
    assert output.loss.requires_grad == bool(wanted)
    if wanted:
        output.loss.backward(given.upstream)
    return Found(output, {name: leaves[name].grad for name in wanted})


def expect(call: Call, given: Inputs, rng=None, nudge: float = 0.0) -> Expected:
    """rng: rounds every logit at random. nudge: moves every threshold by this share."""
    options = call.full
    for name in THRESHOLDS:
        if options[name] is not None:
            options = options | {name: min(options[name] * (1 + nudge), 1.0 if name == "plausibility" else np.inf)}
    if call.options["beta"] < 1e-7:
        options = options | {"beta": 0.0}
    heads = [tuple(None if x is None else x.double().numpy() for x in head) for head in given.heads]
    kinds, logits, hidden = [call.own, call.frozen or call.own], {}, None
    for name, x in given.streams.items():
        x = x.detach().double().numpy().reshape(call.tokens, x.shape[-1])
        size = np.abs(x)
        if call.linear:
            which = 0 if name == "student" or call.frozen is None else 1
            weight, bias = heads[which]
            hidden = x if name == "student" else hidden
            size = np.abs(x) @ np.abs(weight).T + (0.0 if bias is None else np.where(np.isinf(bias), 0.0, np.abs(bias)))
            x, size = (
                oracle.project(x, weight, bias, kinds[which].scale, kinds[which].softcap),
                size * kinds[which].scale,
            )
        x, size = x[:, : call.vocab], size[:, : call.vocab]
        if rng is not None:
            x = np.where(np.isinf(x), x, x + ROUNDING * size * rng.uniform(-1, 1, x.shape))
        logits[name] = x
    others = [logits[name] for name in ("base", "teacher", "reference") if name in logits]
    student = logits["student"]
    goal = oracle.target(*others, options) if call.purified else oracle.log_softmax(others[0] / options["temperature"])
    results, gradient = oracle.jsd(student, goal, options)
    if given.ids is not None:
        results["token_logprob"] = oracle.token_logprob(student, given.ids.numpy().ravel(), options)
    if call.decompose:
        results |= oracle.decompose(student, others[1], others[2], options)
    if call.telemetry:
        results |= oracle.purification(*others, options)
    weights = np.ones(call.tokens) if given.weights is None else given.weights.double().numpy().ravel()
    rows = np.where(weights == 0, 0.0, weights * given.upstream.double().numpy().ravel())
    results["loss"] = np.where(weights == 0, 0.0, weights * results["divergence"])
    results = {name: np.where(weights == 0, 0.0, x) for name, x in results.items()}
    gradient = np.where(rows[:, None] == 0, 0.0, gradient * rows[:, None])
    gradients = {"student": gradient}
    if call.linear:
        gradient = gradient * oracle.head_slope(student, call.own.scale, call.own.softcap)
        weight = heads[0][0][: call.vocab]
        gradients = {"student": gradient @ weight, "weight": gradient.T @ hidden, "bias": gradient.sum(0)[:, None]}
    log_p, log_q = oracle.log_softmax(student / options["temperature"]), oracle.log_softmax(goal)
    least = -600 if options["entry_clip"] is None else -60
    unsure = np.isneginf(log_p) & (log_q < least) | np.isneginf(log_q) & (log_p < least)
    finite = [np.abs(x[np.isfinite(x)]).max(initial=0.0) for x in logits.values()]
    return Expected(results, gradients, unsure.any(-1) if call.vocab else unsure, max(finite) / options["temperature"])


def judge(call: Call) -> None:
    """Raises AssertionError, with what is wrong and the call, which `inputs` makes anew from its print."""
    try:
        with np.errstate(all="ignore"):
            _judge(call)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{call}") from error


def _judge(call: Call) -> None:
    given = inputs(call)
    found, exact = compute(call, given), expect(call, given)
    rng = np.random.default_rng(0)
    largest = max((float(x[torch.isfinite(x)].abs().max()) for x in given.streams.values() if x.numel()), default=0.0)
    nudge = 1e-4 + 8 * ROUNDING * (call.size * 9 if call.linear else largest)
    near = [expect(call, given, rng) for _ in range(2)] + [expect(call, given, None, x) for x in (-nudge, nudge)]
    keep = ~exact.unsure
    values = {name: getattr(found.output, name, None) for name in exact.results}
    for group in (found.output.decomposition, found.output.purification):
        values |= {} if group is None else {name: x for name, x in group._asdict().items() if x is not None}
    for name, expected in exact.results.items():
        value = values.get(name)
        if value is None or (name == "loss" and call.total):
            continue
        value = value.detach().double().numpy().ravel()
        off = np.max([np.abs(x.results[name] - expected) for x in near], axis=0)
        floor = FLOOR * scale_of(call, name, exact.largest)
        slack = TIMES * np.nan_to_num(off, nan=np.inf) + relative(call) * np.abs(expected) + floor
        if call.decompose == "gram" and name.startswith("centred"):
            slack = slack + 2e-3 * gram_scale(call, given)
        same(name, value[keep], expected[keep], slack[keep])
    if call.total and keep.all():
        expected = exact.results["loss"].sum()
        off = max(abs(x.results["loss"].sum() - expected) for x in near)
        magnitude = np.abs(exact.results["loss"]).sum()
        slack = (
            TIMES * off
            + relative(call) * magnitude
            + FLOOR * max(call.tokens, 1) * scale_of(call, "loss", exact.largest)
        )
        same("sum", found.output.loss.detach().double().numpy()[None], np.array([expected]), np.array([slack]))
    for name, value in found.gradients.items():
        judge_gradient(call, given, name, value, exact, near)


def judge_gradient(call, given, name, value, exact, near) -> None:
    assert value is not None and value.shape == (given.streams["student"] if name == "student" else value).shape
    value = value.detach().double().numpy()
    if name == "student":
        value = value.reshape(call.tokens, value.shape[-1])
        assert call.linear or not value[:, call.vocab :].any(), "padding has a gradient"
        value = value if call.linear else value[:, : call.vocab]
    else:
        value = value.reshape(value.shape[0], value.size // value.shape[0])
        assert not value[call.vocab :].any(), f"padding has a gradient: {name}"
        value = value[: call.vocab]
    expected = exact.gradients[name]
    rows = np.abs(given.upstream.double().numpy()).max(initial=0.0) * (call.tokens if name != "student" else 1)
    steep = (call.own.scale if call.linear else 1.0) / call.full["temperature"]
    kl = exact.results["student_kl"]  # of which p·(log-ratio − KL) is the difference in reverse KL
    floor = GRADIENT_FLOOR * rows * steep * max(1.0, call.size / 10, kl[np.isfinite(kl)].max(initial=0.0))
    if call.linear and name == "student":
        floor *= np.linalg.norm(given.heads[0][0].double().numpy())
    if name == "weight":
        floor *= np.abs(given.streams["student"].detach().double().numpy()).max(initial=0.0)
    keep = ~exact.unsure if name == "student" else np.full(len(expected), keep_all(exact))
    if (
        call.full["beta"] == 1.0 or call.full["beta"] > 1 - 1e-7
    ):  # what does not exist is NaN; the sums over tokens with it
        lost = np.isnan(expected).any(-1) | np.isinf(expected).any(-1)
        keep &= ~lost
    off = np.max([np.linalg.norm(x.gradients[name] - expected, axis=-1) for x in near], axis=0)
    norm = np.linalg.norm(expected, axis=-1)
    slack = TIMES * np.nan_to_num(off, nan=np.inf) + relative(call) * norm + floor
    truncated = call.impl == "triton" and call.dtype == "bfloat16"  # by Triton's interpreter, where a GPU rounds
    slack = slack + (1 + truncated) * PRECISION[call.dtype] * norm + SMALLEST[call.dtype] * np.sqrt(value.shape[-1])
    if call.dtype == "float16":
        keep &= np.abs(expected).max(-1, initial=0.0) < 6e4
    same(f"gradient of {name}", np.linalg.norm(value - expected, axis=-1)[keep], np.zeros(int(keep.sum())), slack[keep])


def relative(call: Call) -> float:
    """Triton's probabilities are exponentials of logits less a normaliser, and off by the rounding of a logit, also where they
    are 1; those of torch are divided by their own sum."""
    largest = 5.0 * call.size * call.own.scale / call.full["temperature"]
    return RELATIVE + (2.0 * ROUNDING * largest if call.impl == "triton" else 0.0)


def keep_all(exact: Expected) -> bool:
    return not exact.unsure.any()


def same(name: str, value: np.ndarray, expected: np.ndarray, slack: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        right = (value == expected) | (np.isnan(value) & np.isnan(expected)) | (np.abs(value - expected) <= slack)
        right &= np.isinf(value) == np.isinf(expected)
    assert right.all(), f"{name}: {value[~right][:3]} for {expected[~right][:3]}, allowed {slack[~right][:3]}"


def scale_of(call: Call, name: str, largest: float) -> float:
    """Of the floor: a log-ratio rounds at the size of a logit, of which it is the difference, and so does a norm of many.

    So does the ratio of two normalisers. It moves the KL of student and of target to the mixture apart, and cancels in the
    divergence.
    """
    if name in ("student_kl", "target_kl"):
        return max(1.0, largest / 15)
    size = max(1.0, call.size / call.full["temperature"])  # log-probabilities are of the order of 1 at any temperature
    if name.endswith("norm"):
        return 3.0 * size * np.sqrt(call.vocab)
    if call.impl == "triton" and name.endswith("entropy"):  # Σ p·log p of log p that round at the size of a logit
        return 3.0 * size
    return (
        size
        if name.startswith(("delta", "target_teacher", "target_base", "token"))
        else max(1.0, size / 10, largest / 30)
    )


def gram_scale(call: Call, given: Inputs) -> float:
    weight = given.heads[0][0][: call.vocab].double()
    streams = [x.detach().double() for x in given.streams.values()]
    apart = max(((x - y).norm(dim=-1).max().item() for x in streams for y in streams if x.numel()), default=0.0)
    return float(torch.linalg.norm(weight)) * apart * call.own.scale / call.full["temperature"]
