"""Masks on the target's entries in the interpreter, against the torch backend's and, composed, against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import (  # noqa: F401
    BLOCK,
    DTYPES,
    Guarded,
    oracle_logits,
    small_blocks,
)

from popsd import oracle
from popsd.config import PurifiedConfig
from popsd.engine.torch_backend import entry_masks
from popsd_kernels import (
    EntryMasks,
    LogitTransform,
    RowOptions,
    Rows,
    entry_thresholds,
    logit_difference,
    mask_entries,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS = RowOptions(inv_temperature=0.8, target=LogitTransform(1.3, 12.0))
PLAIN = RowOptions()
ASKED = EntryMasks(plausibility=0.05, tail_floor=0.02, tail_reach=0.1)


def streams(vocabulary: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Base, teacher and reference [3, V]."""
    torch.manual_seed(vocabulary)
    base = torch.randn(3, vocabulary) * 2
    return [(base + 0.7 * torch.randn(3, vocabulary)).to(dtype) for _ in range(3)]


def given(base, teacher, reference, bias=None) -> Rows:
    return Rows(base, base=base, teacher=teacher, reference=reference, frozen_bias=bias)


MATRIX = [
    *((PLAIN, size, torch.float32, False) for size in (1, 97, BLOCK, 2 * BLOCK + 1)),
    *((OPTIONS, 2 * BLOCK + 1, dtype, True) for dtype in DTYPES),
    (OPTIONS, 97, torch.float32, False), (PLAIN, 97, torch.bfloat16, True),
]  # fmt: skip
"""One entry, a tail alone, a full block alone, two full blocks and a tail; then every dtype, transform and bias."""


@pytest.mark.parametrize(("options", "vocabulary", "dtype", "with_bias"), MATRIX)
def test_thresholds_and_masks(options, vocabulary, dtype, with_bias):
    raw, bias = streams(vocabulary, dtype), torch.randn(vocabulary) if with_bias else None
    guarded = [Guarded(x) for x in raw]
    rows = given(*(x.view for x in guarded), bias)
    thresholds = entry_thresholds(rows, ASKED, options)
    z_base, z_teacher, z_reference = (oracle_logits(x, options.target, bias) * options.inv_temperature for x in raw)
    assert (thresholds[0] - (z_base.amax(1) + math.log(0.05))).abs().max() < 1e-5
    for found, z in ((thresholds[1], z_teacher), (thresholds[2], z_reference)):
        assert (found - (z.logsumexp(1) + math.log(0.02))).abs().max() < 1e-5
    same = entry_masks.entry_thresholds(given(*raw, bias), ASKED, options)
    torch.testing.assert_close(thresholds, same, rtol=1e-6, atol=1e-5)
    delta = torch.empty(3, vocabulary)
    offset = logit_difference(rows, options, center=True, out=delta)
    results = []
    for function in (mask_entries, entry_masks.mask_entries):
        edited = Guarded(delta)
        function(rows._replace(difference=edited.view, offset=offset), thresholds, ASKED, options)
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
    rows, masks, delta = (
        given(*raw),
        EntryMasks(0.05, 0.02, entry_masks.tail_reach(0.3, config.pmi_clip)),
        torch.empty(3, 300),
    )
    thresholds = entry_thresholds(rows, masks, PLAIN)
    offset = logit_difference(rows, PLAIN, center=True, out=delta)
    mask_entries(rows._replace(difference=delta, offset=offset), thresholds, masks, PLAIN)
    target = raw[0] + 10.0 * torch.tanh((delta - offset[:, None]) / 10.0)
    exact = oracle.purified_target_logits(*raw, config)
    assert (target.log_softmax(1) - exact.log_softmax(1)).abs().max() < 1e-5


def test_one_mask_alone_reads_its_streams_alone():
    base, teacher, reference = streams(97)
    delta, offset = teacher - reference, torch.zeros(3)
    masks, first = EntryMasks(plausibility=0.05), delta.clone()
    rows = Rows(base, base=base, difference=first, offset=offset)
    plausible = entry_thresholds(rows, masks, PLAIN)
    assert (plausible[1:] == -torch.inf).all()
    mask_entries(rows, plausible, masks, PLAIN)
    assert torch.equal(first != delta, base < plausible[0][:, None])
    masks, second = EntryMasks(tail_floor=0.02, tail_reach=0.1), delta.clone()
    rows = Rows(base, teacher=teacher, reference=reference, difference=second, offset=offset)
    faint = entry_thresholds(rows, masks, PLAIN)
    assert (faint[0] == -torch.inf).all()
    mask_entries(rows, faint, masks, PLAIN)
    assert 0 < (second != delta).sum() < delta.numel() and second[second != delta].abs().max() <= 0.1


@pytest.mark.parametrize("which", ["delta", "base", "reference"])
def test_a_nan_is_not_masked_away(which):
    """An implausible entry's difference gets a finite value, but not where it, or what is compared, is NaN: it must show."""
    base, teacher, reference = streams(300)
    offset = torch.zeros(3)
    rows = given(base, teacher, reference)
    thresholds = entry_thresholds(rows, ASKED, PLAIN)
    implausible = int((base[1] < thresholds[0, 1]).nonzero()[-1])
    {"delta": teacher, "base": base, "reference": reference}[which][1, implausible] = float("nan")
    thresholds, delta = entry_thresholds(rows, ASKED, PLAIN), teacher - reference
    mask_entries(rows._replace(difference=delta, offset=offset), thresholds, ASKED, PLAIN)
    assert (base + delta).isnan().sum(1).tolist() == [0, 1, 0]


def test_nothing_is_less_plausible_than_the_likeliest():
    base, teacher, reference = streams(97)
    delta = teacher - reference
    offset = 0.5 + torch.arange(3.0)
    masks, edited = EntryMasks(plausibility=1.0), delta.clone()
    rows = Rows(base, base=base, difference=edited, offset=offset)
    mask_entries(rows, entry_thresholds(rows, masks, PLAIN), masks, PLAIN)
    likeliest = torch.nn.functional.one_hot(base.argmax(1), 97).bool()
    torch.testing.assert_close(edited, torch.where(likeliest, delta, offset[:, None]), rtol=1e-6, atol=0)


def test_bad_arguments_and_no_rows():
    base, teacher, reference = streams(97)
    rows = given(base, teacher, reference)
    with pytest.raises(ValueError, match=r"rows\.teacher must be given, got None"):
        entry_thresholds(Rows(base, base=base), ASKED, PLAIN)
    with pytest.raises(ValueError, match=r"masks must have a plausibility or a tail_floor, got neither"):
        entry_thresholds(rows, EntryMasks(), PLAIN)
    with pytest.raises(ValueError, match=r"masks\.tail_floor and masks\.tail_reach must be given together"):
        entry_thresholds(rows, EntryMasks(tail_floor=0.1), PLAIN)
    with pytest.raises(ValueError, match=r"rows\.teacher must have shape \[3, 97\]"):
        entry_thresholds(rows._replace(teacher=teacher[:, :90]), ASKED, PLAIN)
    thresholds = entry_thresholds(rows, ASKED, PLAIN)
    rows = rows._replace(difference=teacher - reference, offset=torch.zeros(3))
    with pytest.raises(TypeError, match=r"rows\.difference must be torch\.float32, got torch\.bfloat16"):
        mask_entries(rows._replace(difference=base.bfloat16()), thresholds, ASKED, PLAIN)
    with pytest.raises(ValueError, match=r"rows\.difference must not share memory with rows\.base"):
        mask_entries(rows._replace(difference=base), thresholds, ASKED, PLAIN)
    with pytest.raises(ValueError, match=r"thresholds must be \[3, tokens\]"):
        mask_entries(rows, thresholds[:2], ASKED, PLAIN)
    with pytest.raises(ValueError, match=r"thresholds\.implausible must have shape \[3\]"):
        mask_entries(rows, thresholds[:, :2], ASKED, PLAIN)
    empty = given(*(x[:0] for x in (base, teacher, reference)))
    assert entry_thresholds(empty, ASKED, PLAIN).shape == (3, 0)
    mask_entries(empty._replace(difference=base[:0], offset=torch.zeros(0)), thresholds[:, :0], ASKED, PLAIN)
