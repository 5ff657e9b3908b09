"""What outlives a call must not depend on the call that made it: its grad mode, its default dtype."""

import subprocess
import sys

import pytest
import torch

import popsd
from popsd.testing import make_head, make_hidden

HIDDEN, OTHER, HEAD = make_hidden(9, 16, 0.4), make_hidden(7, 16, 0.4, seed=3), make_head(101, 16)
CALLS = """
import contextlib, sys, torch, popsd
from popsd import DivergenceConfig, HiddenStates, PurifiedConfig
from popsd.testing import make_head, make_hidden

@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)

HIDDEN, HEAD = make_hidden(9, 16, 0.4), make_head(101, 16)
LOGITS = [x @ HEAD.weight.T for x in HIDDEN]
TAIL = {"tail_floor": 0.01, "tail_cap": 0.3, "plausibility": 0.02}

def fields(output):
    for x in output:
        if isinstance(x, tuple):
            yield from fields(x)
        elif x is not None:
            yield x.detach()

def results():
    for config in (PurifiedConfig(), PurifiedConfig(beta=0.3, entry_clip=0.001, **TAIL), PurifiedConfig(pmi_clip=None)):
        for wanted in ({"decompose": True}, {"decompose": "gram"}, {"telemetry": True}):
            leaf, weight = HIDDEN.student.clone().requires_grad_(), HEAD.weight.clone().requires_grad_()
            head, hidden = popsd.Head(weight), HIDDEN._replace(student=leaf)
            output = popsd.linear_purified_jsd(hidden, head, config=config, impl="torch", **wanted)
            if output.loss.requires_grad:
                output.loss.sum().backward()
                yield leaf.grad
                yield weight.grad
            yield from fields(output)
        yield popsd.purified_target_logits(*LOGITS[1:], config=config, impl="torch")
        yield from fields(popsd.purified_jsd(*LOGITS, config=config, impl="torch", decompose=True))
    yield popsd.head_logits(HIDDEN.student, HEAD)
    yield popsd.gram_matrix(HEAD)
    masks = popsd.MaskConfig(top_student_entropy=0.5, softness=0.1)
    yield from fields(popsd.linear_jsd(HIDDEN.student, HEAD, HIDDEN.teacher, impl="torch", masks=masks))
"""


def run(code):
    """In a process of its own, whose first call is the one in question."""
    done = subprocess.run([sys.executable, "-c", CALLS + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("mode", ["torch.inference_mode()", pytest.param("torch.no_grad()", marks=pytest.mark.slow)])
def test_training_goes_on_after_a_first_call_without_gradients(mode):
    """As of a sanity check before training: buffers made under inference_mode may never be written outside it."""
    run(f"""
with {mode}:
    list(results())
first = list(results())
assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True)) and not any(x.is_inference() for x in first)
""")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
def test_the_default_dtype_has_no_say(dtype):
    run(f"""
with default_dtype(torch.{dtype}):
    found = list(results())
after = list(results())
assert all(x.dtype == torch.float32 for x in found), [x.dtype for x in found]
assert all(torch.equal(a, b) for a, b in zip(found, after, strict=True))
assert all(torch.equal(a, b) for a, b in zip(after, results(), strict=True))
import popsd.engine.torch_backend.scratch as scratch
scratch._pool.free = None
assert all(torch.equal(a, b) for a, b in zip(after, results(), strict=True))
""")


def interrupted(at):
    """Results and gradient of a loss during whose ``at``-th line of the torch backend another one is computed."""
    x, lines, tracer = HIDDEN.student.clone().requires_grad_(), 0, sys.gettrace()

    def other():
        popsd.linear_purified_jsd(OTHER, HEAD, decompose=True)

    def trace(frame, event, _):
        nonlocal lines
        if "popsd/engine" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        if event == "line" and lines == at:
            sys.settrace(tracer)
            frame.f_trace = None
            other()
        return trace

    sys.settrace(trace)
    try:
        output = popsd.linear_purified_jsd(HIDDEN._replace(student=x), HEAD, decompose=True)
    finally:
        sys.settrace(tracer)  # the coverage of every later test of this process depends on it
    output.loss.sum().backward()
    return lines, [output.loss.detach(), x.grad, *output.decomposition]


def test_a_loss_that_interrupts_another_leaves_it_alone():
    """As a signal handler does, between any two lines; 30 of them are tried."""
    total, expected = interrupted(-1)
    assert total > 300
    for at in range(1, total, total // 30):
        _, found = interrupted(at)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), at


def test_a_target_may_compute_a_loss():
    def mixed(base, teacher, reference):
        popsd.jsd(reference, teacher)
        return 0.5 * (base + teacher)

    popsd.register_target("computes a loss", mixed)
    popsd.register_target("computes none", lambda base, teacher, _: 0.5 * (base + teacher))
    logits = [x @ HEAD.weight.T for x in HIDDEN]
    calls = (popsd.purified_jsd(*logits, config=popsd.TargetConfig(target=f"computes {x}")) for x in ("a loss", "none"))
    first, second = (output.loss for output in calls)
    assert torch.equal(first, second)


def test_a_handler_may_come_while_the_precision_is_switched():
    """It runs in the thread that holds the lock."""
    from popsd.engine import precision

    with precision._lock:
        popsd.jsd(torch.randn(3, 5), torch.randn(3, 5))
