"""A case of the matrix, run and judged: `make` draws its inputs, `execute` makes the public call, `judge` compares with the
float64 oracle on the same inputs and the same device, a block of rows at a time.

Errors are shares of their bounds: at most 1 passes. All bounds and their reasons are here.
"""

from __future__ import annotations

import os
import unittest.mock
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from matrix import HEADS, Case, Size

import popsd
from popsd import Head, HiddenStates, LossOutput, PurifiedConfig, oracle
from popsd.engine.problem import operand_dtype, problem_of
from popsd.testing import make_head, make_hidden, relative_l2

# What arithmetic may cost. Loss: per token, relative, and LOSS_FLOOR absolute where it is small; the rest: relative L2.
EXACT = 2e-5
"""Logits near 10 round at 1e-6 in float32, and a loss is the difference of a few of them."""
LOSS_FLOOR = 1e-6
STD = 3.0
"""Deviation of the logits for which these hold: larger ones round in proportion to their size."""
GRADIENT = {torch.float32: EXACT, torch.bfloat16: 2.0**-8, torch.float16: 1e-3}
"""The logits' gradient is rounded to 16 bits before the last product, and dH after it. One rounding is off by 1.7e-3 of a
bfloat16 on average and 2^-8 at most, two by 2.3e-3, up to 3.0e-3 where few entries carry the norm. float16 is eight times
finer, but gradients below 6e-5 are subnormal there."""
DOCUMENTED_GRADIENT = 6e-3
"""Of 16-bit operands against exact ones: with the rounding of the difference."""
DECOMPOSITION = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
THRESHOLD = 1e-5
"""How well, relatively, an entry's contribution is known in float32 when it is compared with ``entry_clip``."""
ROUNDING = {torch.bfloat16: 0.43 * 2.0**-8, torch.float16: 0.43 * 2.0**-11}
"""Relative deviation of a number's rounding: uniform within half a last place, of a mantissa that is log-uniform in [1, 2)."""
SIGMAS = 5.0
"""Of a normal variable the largest of 300 exceeds 5 deviations once in 6,000 times."""

ROW_ELEMENTS = 1 << 22
"""Elements of a float64 matrix of the judge: 32 MiB, of which the oracle holds some fifteen."""


class Problem(NamedTuple):
    """A case's inputs: streams student, base (or target), teacher, reference, and heads unless the streams are logits.

    truncated: Triton's interpreter writes a bfloat16, which it truncates (3.7.1) where a GPU rounds: twice the error.
    """

    streams: list[torch.Tensor]
    heads: tuple[Head, Head] | None
    config: PurifiedConfig
    weights: torch.Tensor
    token_ids: torch.Tensor
    truncated: bool = False


class Found(NamedTuple):
    """Everything is per token but the gradients: of the student's stream, and of the head where it is trained."""

    output: LossOutput
    gradients: dict[str, torch.Tensor | None]


def make(case: Case, size: Size, device: str) -> Problem:
    """One token is masked out and holds NaN in every stream; another was not sampled."""
    config = case.config(size)
    order = torch.arange(size.tokens, device=device)
    masked = order == 1
    weights = (torch.rand(size.tokens, device=device) + 0.5).masked_fill(masked, 0.0)
    ids = torch.randint(size.used, (size.tokens,), device=device).masked_fill(order == 2, -1)
    if case.call == "beyond":  # drawn where they are: 13 GiB
        streams = [torch.randn(size.tokens, size.vocab, device=device, dtype=case.dtype) for _ in range(2)]
        return Problem(streams, None, config, weights, ids)
    hidden = make_hidden(size.tokens, size.width, case.spread, dtype=case.dtype, device=device)
    kind, heads = HEADS[case.head], []
    for seed, options in ((1, kind.own), (2, kind.frozen)):
        if options is not None:
            options = dict(options)
            made = make_head(
                size.vocab, size.width, case.std, seed=seed, dtype=case.dtype, device=device,
                bias=options.pop("bias", False),
            )  # fmt: skip
            heads.append(Head(made.weight, made.bias, **options))
    streams = [hidden.student, hidden.base, hidden.teacher, hidden.reference]
    if case.call == "two":
        streams = [hidden.student, hidden.teacher]
    if case.logits:
        projected = (x.float() @ heads[0].weight.float().T for x in streams)
        streams = [x.to(case.dtype).index_fill(1, torch.arange(3, device=device), -torch.inf) for x in projected]
    if case.call in ("purified", "two"):
        streams = [x.masked_fill(masked[:, None], torch.nan) for x in streams]
    return Problem(streams, None if case.logits else (heads[0], heads[-1]), config, weights, ids)


def execute(case: Case, problem: Problem, impl: str) -> Found | popsd.Decomposition | torch.Tensor:
    """The public call, and its gradients."""
    with unittest.mock.patch.dict(os.environ, {"POPSD_KERNELS_PORTABLE": "1"} if case.portable else {}):
        config, heads = problem.config, problem.heads
        if case.call == "target":
            return popsd.purified_target_logits(*problem.streams[1:], config=config, impl=impl)
        if case.call == "decompose":
            assert heads is not None
            return popsd.decompose(HiddenStates(*problem.streams), *heads, config=config, impl=impl)
        leaf = problem.streams[0].detach().clone() if case.call != "beyond" else problem.streams[0]
        arguments: list[Any] = [leaf.requires_grad_(), *problem.streams[1:]]
        common: dict[str, Any] = {
            "config": config,
            "weights": problem.weights,
            "token_ids": problem.token_ids,
            "impl": impl,
        }
        common["reduction"] = "sum" if case.total else "none"
        own = None
        if heads is not None:
            own = Head(heads[0].weight.detach().requires_grad_(case.trainable), heads[0].bias, *_transform(heads[0]))
            if own.bias is not None:
                own = replace(own, bias=own.bias.detach().requires_grad_(case.trainable))
            frozen = [] if heads[0] is heads[1] else [heads[1]]
            common["strategy"] = case.strategy
            arguments = [arguments[0], own, arguments[1], *frozen]
            if case.call == "purified":
                arguments = [HiddenStates(leaf, *problem.streams[1:]), own, *frozen]
        name = ("" if case.logits else "linear_") + ("purified_jsd" if case.call == "purified" else "jsd")
        output: LossOutput = WAYS[case.way](lambda: getattr(popsd, name)(*arguments, **common), leaf)
    gradients = {"dhidden": leaf.grad}
    if case.trainable and own is not None:
        gradients |= {"dweight": own.weight.grad, "dbias": None if own.bias is None else own.bias.grad}
    return Found(output, gradients)


def _transform(head: Head) -> tuple[float, float | None]:
    return head.logit_scale, head.softcap


Step = Callable[[], LossOutput]


def run_plain(step: Step, leaf: torch.Tensor) -> LossOutput:
    output = step()
    output.loss.sum().backward()
    return output


def run_under_autocast(step: Step, leaf: torch.Tensor) -> LossOutput:
    with torch.autocast(leaf.device.type, dtype=torch.bfloat16):
        return run_plain(step, leaf)


def run_compiled(step: Step, leaf: torch.Tensor) -> LossOutput:
    return run_plain(torch.compile(step, fullgraph=True), leaf)


def run_on_a_stream(step: Step, leaf: torch.Tensor) -> LossOutput:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output = run_plain(step, leaf)
    torch.cuda.current_stream().wait_stream(stream)
    return output


def run_captured(step: Step, leaf: torch.Tensor) -> LossOutput:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run_plain(step, leaf)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    assert leaf.grad is not None
    with torch.cuda.graph(graph):
        output = run_plain(step, leaf)
    leaf.grad.zero_()
    graph.replay()
    return output


WAYS: dict[str, Callable[[Step, torch.Tensor], LossOutput]] = {
    "plain": run_plain,
    "under autocast": run_under_autocast,
    "compiled": run_compiled,
    "captured": run_captured,
    "on a stream": run_on_a_stream,
}


class Truth(NamedTuple):
    """In float64. gradients: of Σ weights · loss. allowance: what a threshold adds to their bounds.

    rounding: deviation of the loss, to first order, if every entry of h_T - h_R is off by its own size times a random number
    of deviation 1; entries round independently.
    """

    loss: torch.Tensor
    token_logprob: torch.Tensor
    target_logprob: torch.Tensor
    student_entropy: torch.Tensor
    rounding: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    allowance: float = 0.0


def run(case: Case, size: Size, impl: str, device: str) -> dict[str, float]:
    """Errors as shares of their bounds."""
    torch.manual_seed(0)
    problem = make(case, size, device)
    truncated = impl == "triton" and device == "cpu" and case.dtype == torch.bfloat16
    return judge(case, problem._replace(truncated=truncated), execute(case, problem, impl))


def judge(case: Case, problem: Problem, found: Found | popsd.Decomposition | torch.Tensor) -> dict[str, float]:
    if isinstance(found, torch.Tensor):
        blocks = _row_blocks(*problem.streams[0].shape)
        logits = [[x[rows] for x in problem.streams[1:]] for rows in blocks]
        exact = torch.cat([oracle.purified_target_logits(*some, problem.config).softmax(-1) for some in logits])
        return {"target": relative_l2(found.softmax(-1), exact) / EXACT}
    if isinstance(found, popsd.Decomposition):
        return _judge_decomposition(case, problem, found)
    if case.call == "beyond":
        ends = (slice(0, 16), slice(-16, None))
        parts = [_judge_rows(case, _rows(problem, part), _found_rows(found, part)) for part in ends]
        return {name: max(errors[name] for errors in parts) for name in parts[0]}
    return _judge_rows(case, problem, found)


def _judge_rows(case: Case, problem: Problem, found: Found) -> dict[str, float]:
    exact, dtype = truth(case, problem), operands(problem)
    if dtype not in ROUNDING or not _rounds_the_difference(problem):
        return _compare(case, problem, exact, found)
    # what was asked for is the difference rounded once; what that costs is stated, and looked at apart
    rounded = truth(case, problem._replace(streams=_with_rounded_difference(problem.streams, dtype)))
    errors = _compare(case, problem, rounded, found)
    cost = (rounded.loss - exact.loss).abs() / (SIGMAS * ROUNDING[dtype] * exact.rounding + LOSS_FLOOR)
    errors["loss by rounding"] = float(cost.max())
    if problem.config.entry_clip is None:  # there it takes entries across the threshold, with all of their derivative
        ours, theirs = found.gradients["dhidden"], exact.gradients["dhidden"]
        assert ours is not None and theirs is not None
        errors["dhidden with rounding"] = relative_l2(ours, theirs) / DOCUMENTED_GRADIENT
    return errors


def _compare(case: Case, problem: Problem, exact: Truth, found: Found) -> dict[str, float]:
    """Strictly, with what the inputs and the options say."""
    output, kept = found.output, problem.weights != 0
    bound = (EXACT * exact.loss.abs() + LOSS_FLOOR) * (case.std / STD)
    error = (output.divergence.double() - exact.loss).abs() / bound
    errors = {"loss": float(error[kept].max())}
    sampled = kept & (problem.token_ids >= 0)
    assert output.token_logprob is not None
    errors["token_logprob"] = relative_l2(output.token_logprob[sampled], exact.token_logprob[sampled]) / EXACT
    assert output.target_logprob is not None
    errors["target_logprob"] = relative_l2(output.target_logprob[sampled], exact.target_logprob[sampled]) / EXACT
    errors["student_entropy"] = relative_l2(output.student_entropy[kept], exact.student_entropy[kept]) / EXACT
    for name, value in found.gradients.items():
        expected = exact.gradients[name]
        assert (value is None) == (expected is None), f"{name}: {value} for {expected}"
        if value is not None and expected is not None:
            bound = GRADIENT[case.dtype] * (2.0 if problem.truncated else 1.0) + exact.allowance
            errors[name] = relative_l2(value, expected) / bound
            if name == "dhidden":
                assert not value[~kept].any(), "a masked token has a gradient"
            else:
                assert not value[problem.config.vocab_size :].any(), f"padding has a gradient: {name}"
    assert not output.divergence[~kept].any(), "a masked token has a loss"
    return errors


def truth(case: Case, problem: Problem) -> Truth:
    """The oracle's results a block of rows at a time, so that no [N, V] float64 tensor exists."""
    plain, clip = _truth(case, problem, problem.config), problem.config.entry_clip
    if clip is None:
        return plain
    # Which side of the threshold an entry is on that lies at it, no float32 result can tell.
    around = [
        _truth(case, problem, replace(problem.config, entry_clip=clip * (1.0 + sign * THRESHOLD))).gradients["dhidden"]
        for sign in (-1, 1)
    ]
    assert around[0] is not None and around[1] is not None
    return plain._replace(allowance=relative_l2(around[0], around[1]))


def _truth(case: Case, problem: Problem, config: PurifiedConfig) -> Truth:
    own = frozen = None
    if problem.heads is not None:
        own = _double(problem.heads[0])
        shared = problem.heads[1] is problem.heads[0]
        frozen = _detached(own) if shared else _double(problem.heads[1])
        for tensor in (own.weight, own.bias):
            if tensor is not None:
                tensor.requires_grad_(case.trainable)
    tokens, vocab = problem.streams[0].shape[0], (own.weight if own is not None else problem.streams[0].T).shape[0]
    parts: list[tuple[torch.Tensor, ...]] = []
    for block in _row_blocks(tokens, vocab):
        rows = _rows(problem, block)
        keep = (rows.weights != 0)[:, None]
        streams = [torch.where(keep, x, 0.0).double() for x in rows.streams]
        leaf, teacher = streams[0].requires_grad_(), streams[len(streams) // 2].requires_grad_()
        heads = (own, *[frozen] * 3)
        logits = [x if head is None else oracle.head_logits(x, head) for x, head in zip(streams, heads, strict=False)]
        loss = (oracle.purified_jsd if len(logits) == 4 else oracle.jsd)(*logits, config)
        (loss * rows.weights.double()).sum().backward()
        assert leaf.grad is not None and teacher.grad is not None
        sensitivity = (teacher.grad * (teacher - streams[-1])).norm(dim=-1) / rows.weights.clamp_min(0.5)
        log_p = oracle.log_probs(logits[0].detach(), config)
        with torch.no_grad():
            log_q = oracle.log_probs(logits[1], config)
            if len(logits) == 4:
                log_q = torch.log_softmax(oracle.purified_target_logits(*logits[1:], config), -1)
        chosen, likely = (oracle.sampled(x, rows.token_ids) for x in (log_p, log_q))
        parts.append((loss.detach(), chosen, likely, oracle.entropy(log_p), sensitivity.detach(), leaf.grad))
    results = [torch.cat(some) for some in zip(*parts, strict=True)]
    gradients: dict[str, torch.Tensor | None] = {"dhidden": results[5]}
    if own is not None:
        gradients |= {"dweight": own.weight.grad, "dbias": None if own.bias is None else own.bias.grad}
    return Truth(*results[:5], gradients)


def _double(head: Head) -> Head:
    return replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())


def _detached(head: Head) -> Head:
    return replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())


def _row_blocks(tokens: int, vocab: int) -> list[slice]:
    step = max(1, ROW_ELEMENTS // vocab)
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _rows(problem: Problem, rows: slice) -> Problem:
    streams, ids = [x.detach()[rows] for x in problem.streams], problem.token_ids[rows]
    return problem._replace(streams=streams, weights=problem.weights[rows], token_ids=ids)


def _found_rows(found: Found, rows: slice) -> Found:
    output = found.output._replace(
        divergence=found.output.divergence[rows],
        student_entropy=found.output.student_entropy[rows],
        token_logprob=None if found.output.token_logprob is None else found.output.token_logprob[rows],
        target_logprob=None if found.output.target_logprob is None else found.output.target_logprob[rows],
    )
    return Found(output, {name: None if x is None else x[rows] for name, x in found.gradients.items()})


def operands(problem: Problem) -> torch.dtype:
    """Of the matrix products: float32 for 16-bit tensors on a CPU."""
    if problem.heads is None:
        return torch.float32
    return operand_dtype(problem.heads[1].weight, problem.streams[1], None)


def _rounds_the_difference(problem: Problem) -> bool:
    if problem.heads is None or len(problem.streams) < 4 or problem.config.exact_difference:
        return False
    return not problem_of(HiddenStates(*problem.streams), problem.heads, problem.config).needs_separate_logits


def _with_rounded_difference(streams: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    difference = (streams[2].float() - streams[3].float()).to(dtype)
    return [streams[0], streams[1], streams[3].double() + difference.double(), streams[3]]


def _judge_decomposition(case: Case, problem: Problem, found: popsd.Decomposition) -> dict[str, float]:
    """Norms relative, cosines absolute."""
    assert problem.heads is not None
    parts = []
    for rows in _row_blocks(problem.streams[0].shape[0], problem.heads[0].weight.shape[0]):
        hidden = [x[rows] for x in problem.streams]
        student, teacher, reference = (oracle.head_logits(hidden[k], problem.heads[k > 0]) for k in (0, 2, 3))
        parts.append(oracle.decompose(student, teacher, reference, problem.config))
    exact = popsd.Decomposition(*map(torch.cat, zip(*parts, strict=True)))
    errors = {}
    for name, value in found._asdict().items():
        expected = getattr(exact, name)
        error = float((value - expected).abs().max()) if "cos" in name else relative_l2(value, expected)
        errors[name] = error / DECOMPOSITION[case.dtype]
    return errors
