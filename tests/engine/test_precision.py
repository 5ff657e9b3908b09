"""Float32 matmuls stay float32, whatever the process-wide switches say, and the switches stay as they were."""

import threading
import warnings

import pytest
import torch

import popsd
from popsd import HiddenStates, PurifiedConfig
from popsd.engine import precision as module
from popsd.engine.precision import exact_matmuls
from popsd.testing import make_head, make_hidden

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")
CPU = torch.device("cpu")


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def new_switches():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def inherited():
    for matmul in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"


SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": allow_tf32,
    **({"new switches": new_switches, "inherited": inherited} if NEWER else {}),
}


def state():
    return tuple(switch.read() for switch in module._SWITCHES)


def legacy_state():
    """What the older switch says; it refuses to answer where the newer ones were set by themselves."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@pytest.fixture(autouse=True)
def restored():
    yield
    if NEWER:
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    assert set(state()) <= {"highest", "ieee", "none"}


@pytest.fixture
def recorded(monkeypatch):
    """The switches as each matmul of the package found them."""
    found = []

    def spy(owner, name):
        original = getattr(owner, name)

        def recording(*args, **kwargs):
            found.append(state())
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recording)

    for owner, name in ((torch, "mm"), (torch, "addmm"), (torch.Tensor, "addmm_"), (torch.Tensor, "__matmul__")):
        spy(owner, name)
    return found


def every_matmul():
    """Projection, offset, hidden gradient, dW in forward and in backward, Gram matrix, logits for looking at."""
    hidden, head = make_hidden(5, 8, 0.4), make_head(33, 8)
    head.weight.requires_grad_()
    leaf = hidden.student.clone().requires_grad_()
    streams = HiddenStates(leaf, *hidden[1:])
    for reduction in ("none", "sum"):
        popsd.linear_purified_jsd(streams, head, reduction=reduction, decompose="gram").loss.sum().backward()
    popsd.linear_jsd(leaf, head, hidden.teacher, strategy="chunked").loss.sum().backward()
    popsd.decompose(hidden, make_head(33, 8), method="gram")
    popsd.decompose(hidden, head)
    popsd.head_logits(hidden.student, head)


@pytest.mark.parametrize("reduce", SETTINGS.values(), ids=SETTINGS)
def test_every_matmul_is_exact_and_the_switches_come_back(reduce, recorded):
    every_matmul()
    exact, count = set(recorded), len(recorded)
    assert count > 20, "the spies see nothing"
    reduce()
    before, legacy = state(), legacy_state()
    assert not set(before) <= {"highest", "ieee", "none"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every_matmul()
    assert len(recorded) == 2 * count
    assert all(value in ("highest", "ieee", "none") for found in recorded for value in found), exact
    assert (state(), legacy_state()) == (before, legacy)


@pytest.mark.parametrize("reduce", SETTINGS.values(), ids=SETTINGS)
def test_an_exception_restores_them(reduce, monkeypatch):
    reduce()
    before = state()

    def failing(*_, **__):
        raise ArithmeticError

    monkeypatch.setattr(torch, "mm", failing)
    with pytest.raises(ArithmeticError):
        popsd.linear_purified_jsd(make_hidden(5, 8, 0.4), make_head(33, 8), config=PurifiedConfig())
    assert state() == before and module._inside == 0


def test_threads_that_overlap_restore_what_the_first_one_found():
    torch.set_float32_matmul_precision("medium")
    before, inside, leave = state(), threading.Event(), threading.Event()

    def other():
        with exact_matmuls(CPU):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with exact_matmuls(CPU):
        thread.start()
        assert inside.wait(10)
    still = state()
    leave.set()
    thread.join(10)
    assert set(still) <= {"highest", "ieee"} and state() == before


def test_what_is_set_in_the_meantime_stays():
    torch.set_float32_matmul_precision("high")
    with exact_matmuls(CPU):
        torch.set_float32_matmul_precision("medium")
        medium = state()
        with exact_matmuls(CPU):
            assert set(state()) <= {"highest", "ieee"}
    assert state() == medium and torch.get_float32_matmul_precision() == "medium"


@pytest.mark.skipif(not NEWER, reason="torch before 2.9 has no such switch")
def test_an_inherited_switch_goes_on_inheriting():
    inherited()
    with exact_matmuls(CPU):
        assert set(state()) == {"ieee"}
    torch.backends.fp32_precision = "ieee"
    assert set(state()) == {"ieee"}
