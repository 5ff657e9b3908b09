"""Correctness of every path, dtype and option at real sizes, against float64 on the same device.

    PYTHONPATH=.:kernels:integrations python benchmarks/gpu/check.py --out check.json

Needs torch and Triton only. Prints one line per case, the failures again at the end, and exits with their number. On a GPU
eight processes share the cases, since most of the time goes to compiling them.
`--device cpu --tokens 24 --vocab 997 --width 48` runs the same cases through the torch bodies on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pool import run_all

import popsd
from popsd import Head, PurifiedConfig
from popsd.testing import Truth, make_head, make_hidden, relative_l2, true_jsd, true_purified

# Loss: relative, and absolute where it is small. Gradients: relative L2 (DESIGN.md, "Numbers to reach").
LOSS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
GRADIENT = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 6e-3}
EXACT_GRADIENT = 3e-3
LOSS_FLOOR = 1e-6
SPREADS = {"kl 1e-3": 0.012, "kl 1e-1": 0.12, "kl 1": 0.45}
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3},
    "entry_clip": {"entry_clip": 1e-3},
    "token_clip": {"token_clip": 0.4},
    "no pmi_clip": {"pmi_clip": None},
    "pmi_beta": {"pmi_beta": 2.0},
    "uncentred": {"center": False},
    "exact_difference": {"exact_difference": True},
    "plausibility": {"plausibility": 0.1},
    "tail cap": {"tail_floor": 1e-3, "tail_cap": 0.1},
}
HEADS: dict[str, dict[str, Any]] = {"scale": {"logit_scale": 0.5}, "softcap": {"softcap": 30.0}}


@dataclass(frozen=True)
class Size:
    tokens: int
    vocab: int
    width: int
    device: str
    impl: str

    @property
    def used(self) -> int:
        """Rows of the vocabulary in use: all but some padding, as in Qwen3's 151,669 of 151,936."""
        return self.vocab - max(1, self.vocab // 569)


Case = tuple[str, Callable[[], dict[str, float]]]


def compare(
    output: popsd.LossOutput,
    gradients: dict[str, torch.Tensor],
    truth: Truth,
    dtype: torch.dtype,
    bound: float | None = None,
) -> dict[str, float]:
    """Errors over their bounds: everything at most 1 passes."""
    error = (output.loss.detach().double() - truth.loss).abs()
    result = {"loss": float((error / (LOSS[dtype] * truth.loss.abs() + LOSS_FLOOR)).max())}
    exact = {"dhidden": truth.dhidden, "dweight": truth.dweight, "dbias": truth.dbias}
    for name, value in gradients.items():
        expected = exact[name]
        assert expected is not None
        result[name] = relative_l2(value, expected) / (bound or GRADIENT[dtype])
    return result


def linear_case(
    size: Size,
    *,
    dtype: torch.dtype,
    spread: float,
    std: float = 3.0,
    head: dict[str, Any] | None = None,
    bias: bool = False,
    trainable: bool = False,
    two: bool = False,
    reduction_sum: bool = False,
    **options: Any,
) -> dict[str, float]:
    hidden = make_hidden(size.tokens, size.width, spread, dtype=dtype, device=size.device)
    made = make_head(size.vocab, size.width, std, dtype=dtype, device=size.device, bias=bias)
    own = Head(made.weight, made.bias, **(head or {}))
    config = PurifiedConfig(vocab_size=size.used, **options)
    weights = torch.rand(size.tokens, device=size.device) + 0.5
    leaf = hidden.student.clone().requires_grad_()
    own.weight.requires_grad_(trainable)
    if own.bias is not None:
        own.bias.requires_grad_(trainable)
    reduction = "sum" if reduction_sum else "none"
    common: dict[str, Any] = {"config": config, "weights": weights, "impl": size.impl, "reduction": reduction}
    if two:
        output = popsd.linear_jsd(leaf, own, hidden.teacher, **common)
        truth = true_jsd(hidden.student, hidden.teacher, (own, own), config, weights)
    else:
        output = popsd.linear_purified_jsd(hidden._replace(student=leaf), own, **common)
        truth = true_purified(hidden, (own, own), config, weights)
    output.loss.sum().backward()
    assert leaf.grad is not None
    gradients = {"dhidden": leaf.grad}
    if trainable:
        assert own.weight.grad is not None
        gradients["dweight"] = own.weight.grad
        if own.bias is not None and own.bias.grad is not None:
            gradients["dbias"] = own.bias.grad
    bound = EXACT_GRADIENT if config.exact_difference and dtype != torch.float32 else None
    return compare(output._replace(loss=output.divergence), gradients, truth, dtype, bound)


def forced_split(size: Size, few: bool, **case: Any) -> dict[str, float]:
    """One program per row, or several, whatever the number of tokens says (kernels only; the torch bodies know neither)."""
    try:
        from popsd_kernels import launch
    except ImportError:  # without Triton
        return linear_case(size, **case)
    with unittest.mock.patch.object(launch, "too_few_rows", return_value=few):
        return linear_case(size, **case)


def logits_case(size: Size, *, dtype: torch.dtype, beta: float, two: bool) -> dict[str, float]:
    head = make_head(size.vocab, size.width, dtype=dtype, device=size.device)
    hidden = make_hidden(size.tokens, size.width, 0.3, dtype=dtype, device=size.device)
    logits = [x.float() @ head.weight.float().T for x in hidden]
    logits = [x.to(dtype).index_fill(1, torch.arange(3, device=size.device), -torch.inf) for x in logits]
    config, leaf = PurifiedConfig(beta=beta), logits[0].clone().requires_grad_()
    exact = logits[0].double().requires_grad_()
    name, count = ("jsd", 2) if two else ("purified_jsd", 4)
    truth = getattr(popsd.oracle, name)(exact, *logits[1:count], config)
    truth.sum().backward()
    output = getattr(popsd, name)(leaf, *logits[1:count], config=config, impl=size.impl)
    output.loss.sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    return compare(output, {"dhidden": leaf.grad}, Truth(truth.detach(), exact.grad, exact.grad, None), dtype)


def decomposition_case(size: Size, *, dtype: torch.dtype, head: dict[str, Any]) -> dict[str, float]:
    """Every field of Eq. 4 over its bound: norms relative, cosines absolute."""
    hidden = make_hidden(size.tokens, size.width, 0.3, dtype=dtype, device=size.device)
    made = make_head(size.vocab, size.width, dtype=dtype, device=size.device, bias=True)
    own = Head(made.weight, made.bias, **head)
    config = PurifiedConfig(vocab_size=size.used)
    found = popsd.decompose(hidden, own, config=config, impl=size.impl)
    student, _, teacher, reference = (popsd.oracle.head_logits(x, own) for x in hidden)
    truth = popsd.oracle.decompose(student, teacher, reference, config)
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    result = {}
    for name, value in found._asdict().items():
        exact = getattr(truth, name)
        error = float((value.double() - exact).abs().max()) if "cos" in name else relative_l2(value, exact)
        result[name] = error / bound
    return result


def beyond_int32(size: Size) -> dict[str, float]:
    """More than 2^31 logits in one tensor: the last rows must be as right as the first."""
    rows = 2**31 // size.vocab + 129 if size.device != "cpu" else size.tokens
    generator = torch.Generator(size.device).manual_seed(0)
    streams = [torch.randn(rows, size.vocab, generator=generator, device=size.device).bfloat16() for _ in range(2)]
    leaf = streams[0].requires_grad_()
    output = popsd.jsd(leaf, streams[1], impl=size.impl)
    output.loss.sum().backward()
    assert leaf.grad is not None
    worst = {"loss": 0.0, "dhidden": 0.0}
    for part in (slice(0, 16), slice(rows - 16, rows)):
        exact = leaf.detach()[part].double().requires_grad_()
        truth = popsd.oracle.jsd(exact, streams[1][part], PurifiedConfig())
        truth.sum().backward()
        assert exact.grad is not None
        some = output._replace(loss=output.loss[part])
        errors = compare(
            some, {"dhidden": leaf.grad[part]}, Truth(truth.detach(), exact.grad, exact.grad, None), torch.bfloat16
        )
        worst = {name: max(worst[name], errors[name]) for name in worst}
    return worst


def same_result(size: Size, run: Callable[[Callable[[], torch.Tensor], torch.Tensor], None]) -> dict[str, float]:
    """A way of running the step (compiled, captured, on another stream) must change nothing but rounding."""
    hidden = make_hidden(size.tokens, size.width, 0.3, dtype=torch.bfloat16, device=size.device)
    head = make_head(size.vocab, size.width, dtype=torch.bfloat16, device=size.device)
    leaf = hidden.student.clone().requires_grad_()

    def step() -> torch.Tensor:
        return popsd.linear_purified_jsd(hidden._replace(student=leaf), head, reduction="sum", impl=size.impl).loss

    step().backward()
    assert leaf.grad is not None
    expected = leaf.grad.clone()
    leaf.grad.zero_()
    run(step, leaf)
    return {"dhidden": relative_l2(leaf.grad, expected) / 1e-3}


def run_compiled(step: Callable[[], torch.Tensor], leaf: torch.Tensor) -> None:
    torch.compile(step, fullgraph=True)().backward()


def run_on_stream(step: Callable[[], torch.Tensor], leaf: torch.Tensor) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step().backward()
    torch.cuda.current_stream().wait_stream(stream)


def run_captured(step: Callable[[], torch.Tensor], leaf: torch.Tensor) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    assert leaf.grad is not None
    with torch.cuda.graph(graph):
        step().backward()
    leaf.grad.zero_()
    graph.replay()


def run_autocast(step: Callable[[], torch.Tensor], leaf: torch.Tensor) -> None:
    with torch.autocast(leaf.device.type, dtype=torch.bfloat16):
        step().backward()


def cases(size: Size) -> Iterator[Case]:
    betas, dtypes = (0.0, 0.3, 0.5, 1.0), (torch.float32, torch.bfloat16, torch.float16)
    for dtype, (kl, spread), beta in itertools.product(dtypes, SPREADS.items(), betas):
        yield (
            f"purified {dtype} {kl} beta {beta}",
            lambda d=dtype, s=spread, b=beta: linear_case(size, dtype=d, spread=s, beta=b),
        )
    for std, beta in itertools.product((10.0, 30.0), betas):
        yield (
            f"purified bf16 logit std {std} beta {beta}",
            lambda s=std, b=beta: linear_case(size, dtype=torch.bfloat16, spread=0.12, std=s, beta=b),
        )
    for dtype, (name, options), beta in itertools.product(dtypes[:2], OPTIONS.items(), (0.0, 0.5, 1.0)):
        yield (
            f"purified {dtype} {name} beta {beta}",
            lambda d=dtype, o=options, b=beta: linear_case(size, dtype=d, spread=0.3, beta=b, **o),
        )
    for dtype, (name, head), two in itertools.product(dtypes[:2], HEADS.items(), (False, True)):
        yield (
            f"{'two' if two else 'purified'} {dtype} {name}",
            lambda d=dtype, h=head, t=two: linear_case(size, dtype=d, spread=0.3, beta=0.3, head=h, bias=True, two=t),
        )
    for dtype, total, two in itertools.product(dtypes, (False, True), (False, True)):
        label = f"{'two' if two else 'purified'} {dtype} trainable {'sum' if total else 'per token'}"
        yield (
            label,
            lambda d=dtype, s=total, t=two: linear_case(
                size, dtype=d, spread=0.3, beta=0.5, bias=True, trainable=True, reduction_sum=s, two=t
            ),
        )
    for dtype, beta, two in itertools.product(dtypes, (0.0, 0.5, 1.0), (False, True)):
        yield (
            f"{'two' if two else 'purified'} logits {dtype} beta {beta}",
            lambda d=dtype, b=beta, t=two: logits_case(size, dtype=d, beta=b, two=t),
        )
    for few, beta, two in itertools.product((False, True), (0.0, 0.5, 1.0), (False, True)):
        yield (
            f"{'two' if two else 'purified'} {'several programs' if few else 'one program'} per row beta {beta}",
            lambda f=few, b=beta, t=two: forced_split(
                size, f, dtype=torch.float32, spread=0.3, beta=b, two=t, bias=True
            ),
        )
    for dtype, (name, head) in itertools.product(dtypes[:2], {"plain": {}, **HEADS}.items()):
        yield f"decomposition {dtype} {name}", lambda d=dtype, h=head: decomposition_case(size, dtype=d, head=h)
    yield "autocast", lambda: same_result(size, run_autocast)
    if size.device != "cpu":
        yield "more than 2^31 logits", lambda: beyond_int32(size)
        yield "torch.compile, one graph", lambda: same_result(size, run_compiled)
        yield "CUDA graph", lambda: same_result(size, run_captured)
        yield "another stream", lambda: same_result(size, run_on_stream)


def run_case(size: Size, name: str) -> dict[str, Any]:
    """Errors as shares of their bounds, and seconds; a broken case must not hide the others."""
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        result: dict[str, Any] = {"errors": dict(cases(size))[name]()}
    except Exception as error:
        result = {"exception": f"{type(error).__name__}: {error}"[:300]}
    return result | {"seconds": round(time.perf_counter() - start, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--processes", type=int, help="default: 8 on a GPU, this one alone on CPU")
    parser.add_argument("--out", type=Path, help="write results as JSON after every case")
    arguments = parser.parse_args()
    size = Size(arguments.tokens, arguments.vocab, arguments.width, arguments.device, arguments.impl)
    results: dict[str, Any] = {}
    report = {"versions": versions(arguments.device), "arguments": vars(arguments) | {"out": None}, "cases": results}
    names = [name for name, _ in cases(size) if arguments.only in name]
    run, processes = functools.partial(run_case, size), arguments.processes or (1 if size.device == "cpu" else 8)
    found = ((name, run(name)) for name in names) if processes == 1 else run_all(run, names, processes)
    for name, result in found:
        passed = "exception" not in result and all(x <= 1.0 for x in result["errors"].values())
        results[name] = {"passed": passed, **result}
        shown = {key: round(x, 3) for key, x in result.get("errors", {}).items()} or result
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {shown}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1))
    failed = [name for name, result in results.items() if not result["passed"]]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed (errors are shares of their bounds)")
    for name in failed:
        print("FAIL", name, results[name])
    return min(len(failed), 125) if results else 1


def versions(device: str) -> dict[str, str]:
    found = {"popsd": popsd.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    return found


if __name__ == "__main__":
    sys.exit(main())
