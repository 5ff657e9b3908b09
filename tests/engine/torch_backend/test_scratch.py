"""What outlives a call must not depend on the call that made it: its grad mode, its default dtype."""

import subprocess
import sys

import pytest

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
del scratch._pool.buffers
assert all(torch.equal(a, b) for a, b in zip(after, results(), strict=True))
""")
