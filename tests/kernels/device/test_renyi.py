"""The Rényi mode of the kernels that a machine without a GPU reaches by their launchers alone."""

import pytest
import torch
from kernel_helpers import oracle_config, small_blocks  # noqa: F401

from popsd import oracle
from popsd.testing import relative_l2
from popsd_kernels import RowOptions, Rows, row_loss_gradient, row_split_sweeps, row_statistics

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("vocabulary", [128, 131])
def test_rows_by_one_program_and_by_several(split, vocabulary, small_blocks):  # noqa: F811
    generator = torch.Generator().manual_seed(0)
    student = 3.0 * torch.randn(4, vocabulary, generator=generator)
    target = student + 0.3 * torch.randn(4, vocabulary, generator=generator)
    rows, options, gradient = Rows(student, target=target), RowOptions(beta=0.0, renyi=0.9), torch.empty_like(student)
    if split:
        _, found = row_split_sweeps(rows, options, gradient=gradient)
    else:
        found = row_loss_gradient(rows, row_statistics(rows, options), options, gradient=gradient)
    leaf = student.double().requires_grad_()
    expected = oracle.jsd(leaf, target.double(), oracle_config(options))
    expected.sum().backward()
    assert relative_l2(found.divergence, expected.detach()) < 2e-5 and relative_l2(gradient, leaf.grad) < 2e-5
    with pytest.raises(ValueError, match="entry_clip: expected None with renyi"):
        row_split_sweeps(rows, RowOptions(beta=0.0, renyi=0.9, entry_clip=0.1))
