"""What the kernel tests share: small blocks, guarded buffers, the float64 oracle on row options.

On CPU conftest.py has decorated the kernels for Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch

from popsd import oracle
from popsd.config import PurifiedConfig
from popsd.head import Head
from popsd_kernels import LogitTransform, RowOptions, Rows, launch

BLOCK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""What rounding an output to that dtype costs, relative: half a unit in the last place, a whole one in bfloat16, which the
interpreter truncates (Triton 3.7.1; a GPU rounds to nearest)."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several full blocks and a tail at vocabularies the interpreter can afford."""
    monkeypatch.setattr(launch, "shipped_config", lambda kernel, device: launch.LaunchConfig(BLOCK, 4, 4))


@dataclass
class Guarded:
    """A [C, V] tensor inside a larger buffer, off its corner and with a pitch of its own, so that any access outside
    shows: reads meet NaN, writes destroy a pattern."""

    values: torch.Tensor
    pitch_excess: int = 7
    buffer: torch.Tensor = field(init=False)
    view: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        self.buffer = torch.full((rows + 2, columns + self.pitch_excess), float("nan"), dtype=self.values.dtype)
        self.view = self.buffer[1:-1, 3 : 3 + columns]
        self.view.copy_(self.values)

    def assert_intact(self) -> None:
        outside = torch.ones_like(self.buffer, dtype=torch.bool)
        outside[1:-1, 3 : 3 + self.values.shape[1]] = False
        assert self.buffer[outside].isnan().all(), "written outside the tensor"

    def assert_unchanged(self) -> None:
        self.assert_intact()
        assert torch.equal(self.view.nan_to_num(123.0), self.values.nan_to_num(123.0)), "an input was written"


def poisoned(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Guarded:
    """An output buffer: NaN where it must be written, NaN where it must not."""
    return Guarded(torch.full((rows, columns), float("nan"), dtype=dtype))


def rows_of(student, frozen, difference=None, offset=None, **rest) -> Rows:
    """Rows of two distributions or, with a difference, of a target composed on ``frozen``."""
    if difference is None:
        return Rows(student, target=frozen, **rest)
    return Rows(student, base=frozen, difference=difference, offset=offset, **rest)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2, refusing a reference too small to mean anything."""
    expected = expected.double()
    assert expected.norm() > 1e-5, "the reference vanishes: the comparison would prove nothing"
    return float((actual.double() - expected).norm() / expected.norm())


def oracle_config(options: RowOptions, center: bool = True) -> PurifiedConfig:
    return PurifiedConfig(
        beta=options.beta, renyi_alpha=options.renyi, temperature=1.0 / options.inv_temperature, token_clip=options.token_clip,
        entry_clip=options.entry_clip, pmi_beta=options.pmi_beta, pmi_clip=options.pmi_clip, center=center,
    )  # fmt: skip


def oracle_logits(raw: torch.Tensor, transform: LogitTransform, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Untempered float64 logits of raw projections [C, V]: the oracle's head with the identity as its matrix."""
    if transform == LogitTransform() and bias is None:
        return raw.double()  # the identity of a real vocabulary would not fit
    return oracle.head_logits(raw, Head(torch.eye(raw.shape[1]), bias, transform.scale, transform.softcap))


def oracle_target(
    options: RowOptions, target: torch.Tensor, delta: torch.Tensor | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """log q [C, V] float64 of raw target (or base) projections and the raw difference, centred."""
    config, logits = oracle_config(options), oracle_logits(target, options.target, bias)
    if delta is None:
        return oracle.log_probs(logits, config)
    teacher = delta.double() * options.delta_scale
    return oracle.purified_target_logits(logits, teacher, torch.zeros_like(teacher), config).log_softmax(-1)


@dataclass
class Expected:
    """The oracle's row results and, by autograd through it, the gradient of the raw student projections."""

    log_p: torch.Tensor
    divergence: torch.Tensor
    student_kl: torch.Tensor
    target_kl: torch.Tensor
    gradient: torch.Tensor


def oracle_rows(
    options: RowOptions,
    student: torch.Tensor,
    log_q: torch.Tensor,
    student_bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> Expected:
    raw = student.double().requires_grad_()
    config = oracle_config(options)
    log_p = oracle.log_probs(oracle_logits(raw, options.student, student_bias), config)
    divergence = oracle.divergence(log_p, log_q, config)
    (divergence if row_scale is None else divergence * row_scale.double()).sum().backward()
    assert raw.grad is not None
    log_p, reverse = log_p.detach(), oracle_config(RowOptions(beta=1.0))
    log_m = torch.logaddexp(log_p + torch.tensor(1.0 - options.beta).log(), log_q + torch.tensor(options.beta).log())
    log_m = {0.0: log_p, 1.0: log_q}.get(options.beta, log_m)
    kl_p, kl_q = (oracle.divergence(x, log_m, reverse) for x in (log_p, log_q))
    return Expected(log_p, divergence.detach(), kl_p, kl_q, raw.grad)


def run_without_interpreter(*arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """``python <arguments>`` where kernels are compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def interpreted(function):
    """A probe kernel for the interpreter, whatever the environment says."""
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)
