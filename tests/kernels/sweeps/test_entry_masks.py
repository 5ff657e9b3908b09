"""Masks on the target's entries in the interpreter, against their torch bodies and, composed, against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import (  # noqa: F401  (first: switches the interpreter on)
    BLOCK,
    DTYPES,
    Guarded,
    oracle_logits,
    small_blocks,
)

from popsd import oracle
from popsd.config import PurifiedConfig
from popsd.engine.torch_backend import entry_masks
from popsd_kernels import LogitTransform, RowOptions, entry_thresholds, logit_difference, mask_entries

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS = RowOptions(inv_temperature=0.8, target=LogitTransform(1.3, 12.0))
PLAIN = RowOptions()
ASKED = {"plausibility": 0.05, "tail_floor": 0.02}


def streams(vocabulary: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Base, teacher and reference [3, V]."""
    torch.manual_seed(vocabulary)
    base = torch.randn(3, vocabulary) * 2
    return [(base + 0.7 * torch.randn(3, vocabulary)).to(dtype) for _ in range(3)]


MATRIX = [
    *((PLAIN, size, torch.float32, False) for size in (1, 97, BLOCK, 2 * BLOCK + 1)),
    *((OPTIONS, 2 * BLOCK + 1, dtype, True) for dtype in DTYPES),
    (OPTIONS, 97, torch.float32, False), (PLAIN, 97, torch.bfloat16, True),
]  # fmt: skip
"""One entry, a tail alone, a full block alone, two full blocks and a tail; then every dtype, transform and bias."""


@pytest.mark.parametrize(("options", "vocabulary", "dtype", "with_bias"), MATRIX)
def test_thresholds_and_masks(options, vocabulary, dtype, with_bias):
    raw, bias = streams(vocabulary, dtype), torch.randn(vocabulary) if with_bias else None
    guarded, common = [Guarded(x) for x in raw], {"bias": bias, "options": options}
    base, teacher, reference = (x.view for x in guarded)
    thresholds = entry_thresholds(base, teacher, reference, **ASKED, **common)
    z_base, z_teacher, z_reference = (oracle_logits(x, options.target, bias) * options.inv_temperature for x in raw)
    assert (thresholds[0] - (z_base.amax(1) + math.log(0.05))).abs().max() < 1e-5
    for found, z in ((thresholds[1], z_teacher), (thresholds[2], z_reference)):
        assert (found - (z.logsumexp(1) + math.log(0.02))).abs().max() < 1e-5
    torch.testing.assert_close(thresholds, entry_masks.entry_thresholds(*raw, **ASKED, **common), rtol=1e-6, atol=1e-5)
    delta = torch.empty(3, vocabulary)
    offset = logit_difference(teacher, reference, delta, bias=bias, options=options, center=True)
    results = []
    for body in (mask_entries, entry_masks.mask_entries):
        edited = Guarded(delta)
        body(edited.view, offset, thresholds, base, reference, tail_reach=0.1, **common)
        results.append(edited.view.clone())
    for x in guarded:
        x.assert_unchanged()
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    centred = options.inv_temperature * results[0].double() - offset[:, None]
    implausible, faint = z_base < thresholds[0][:, None], z_reference < thresholds[2][:, None]
    faint &= z_teacher < thresholds[1][:, None]
    clear = ((z_base - thresholds[0][:, None]).abs() > 1e-4) & ((z_teacher - thresholds[1][:, None]).abs() > 1e-4)
    assert centred[implausible & clear].abs().sum() < 1e-4
    if vocabulary > 1:
        assert 0 < implausible.sum() < implausible.numel() and (faint & ~implausible).any()
        assert centred[faint & clear].abs().max() < 0.1 + 1e-5 < centred.abs().max()


def test_the_masked_target_is_the_oracles():
    raw = streams(300)
    config = PurifiedConfig(plausibility=0.05, tail_floor=0.02, tail_cap=0.3)
    thresholds = entry_thresholds(*raw, **ASKED, options=PLAIN)
    delta = torch.empty(3, 300)
    offset = logit_difference(*raw[1:], delta, options=PLAIN, center=True)
    mask_entries(delta, offset, thresholds, raw[0], raw[2], options=PLAIN, tail_reach=entry_masks.tail_reach(config))
    target = raw[0] + 10.0 * torch.tanh((delta - offset[:, None]) / 10.0)
    exact = oracle.purified_target_logits(*raw, config)
    assert (target.log_softmax(1) - exact.log_softmax(1)).abs().max() < 1e-5


def test_one_mask_alone_reads_its_streams_alone():
    base, teacher, reference = streams(97)
    delta, offset = teacher - reference, torch.zeros(3)
    plausible = entry_thresholds(base, None, None, plausibility=0.05, options=PLAIN)
    assert (plausible[1:] == -torch.inf).all()
    first = delta.clone()
    mask_entries(first, offset, plausible, base, None, options=PLAIN)
    assert torch.equal(first != delta, base < plausible[0][:, None])
    faint = entry_thresholds(None, teacher, reference, tail_floor=0.02, options=PLAIN)
    assert (faint[0] == -torch.inf).all()
    second = delta.clone()
    mask_entries(second, offset, faint, None, reference, options=PLAIN, tail_reach=0.1)
    assert 0 < (second != delta).sum() < delta.numel() and second[second != delta].abs().max() <= 0.1


@pytest.mark.parametrize("which", ["delta", "base", "reference"])
def test_a_nan_is_not_masked_away(which):
    """An implausible entry's difference gets a finite value, but not where it, or what is compared, is NaN: it must show."""
    base, teacher, reference = streams(300)
    offset = torch.zeros(3)
    thresholds = entry_thresholds(base, teacher, reference, **ASKED, options=PLAIN)
    implausible = int((base[1] < thresholds[0, 1]).nonzero()[-1])
    {"delta": teacher, "base": base, "reference": reference}[which][1, implausible] = float("nan")
    thresholds, delta = entry_thresholds(base, teacher, reference, **ASKED, options=PLAIN), teacher - reference
    mask_entries(delta, offset, thresholds, base, reference, options=PLAIN, tail_reach=0.1)
    assert (base + delta).isnan().sum(1).tolist() == [0, 1, 0]


def test_nothing_is_less_plausible_than_the_likeliest():
    base, teacher, reference = streams(97)
    delta = teacher - reference
    offset = 0.5 + torch.arange(3.0)
    thresholds = entry_thresholds(base, None, None, plausibility=1.0, options=PLAIN)
    edited = delta.clone()
    mask_entries(edited, offset, thresholds, base, None, options=PLAIN)
    likeliest = torch.nn.functional.one_hot(base.argmax(1), 97).bool()
    torch.testing.assert_close(edited, torch.where(likeliest, delta, offset[:, None]), rtol=1e-6, atol=0)


def test_bad_arguments_and_no_rows():
    base, teacher, reference = streams(97)
    with pytest.raises(ValueError, match="base goes with plausibility, and teacher and reference with tail_floor, got"):
        entry_thresholds(base, None, None, tail_floor=0.1, options=PLAIN)
    with pytest.raises(ValueError, match="a stream with its threshold must be given, got none"):
        entry_thresholds(None, None, None, options=PLAIN)
    with pytest.raises(ValueError, match=r"teacher must have shape \[3, 97\]"):
        entry_thresholds(base, teacher[:, :90], reference, **ASKED, options=PLAIN)
    thresholds, offset = entry_thresholds(base, teacher, reference, **ASKED, options=PLAIN), torch.zeros(3)
    with pytest.raises(ValueError, match="reference and tail_reach must be given together"):
        mask_entries(teacher - reference, offset, thresholds, base, reference, options=PLAIN)
    with pytest.raises(TypeError, match=r"delta must be torch\.float32, got torch\.bfloat16"):
        mask_entries(base.bfloat16(), offset, thresholds, base, None, options=PLAIN)
    with pytest.raises(ValueError, match=r"thresholds\[0\] must have shape \[3\]"):
        mask_entries(teacher - reference, offset, thresholds[:, :2], base, None, options=PLAIN)
    empty = [x[:0] for x in (base, teacher, reference)]
    assert entry_thresholds(*empty, **ASKED, options=PLAIN).shape == (3, 0)
    mask_entries(empty[0], offset[:0], thresholds[:, :0], empty[1], None, options=PLAIN)
