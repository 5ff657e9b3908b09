"""The torch sweeps where a formula of theirs could lose its digits: coefficients near 0 and 1, wide clips, 16-bit biases."""

import math

import pytest
import torch

import popsd
from popsd import PurifiedConfig
from popsd.config import BETA_RESOLUTION
from popsd.engine.torch_backend.targets import SIGMOID_CLIP, tempered_logits
from popsd.testing import make_head, make_hidden, relative_l2, true_purified
from popsd_kernels.rows import LogitTransform, RowOptions

N = 64


def errors(spread, std, config):
    """Relative errors of loss and hidden gradient against the oracle."""
    hidden, head, upstream = make_hidden(N, 64, spread), make_head(1003, 64, std), torch.ones(N)
    truth = true_purified(hidden, (head, head), config, upstream)
    leaf = hidden.student.clone().requires_grad_()
    output = popsd.linear_purified_jsd(hidden._replace(student=leaf), head, config=config, impl="torch")
    output.loss.sum().backward()
    return relative_l2(output.loss, truth.loss), relative_l2(leaf.grad, truth.dhidden)


@pytest.mark.parametrize("distance", [0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1.01 * BETA_RESOLUTION])
@pytest.mark.parametrize("mirrored", [False, True], ids=["near 0", "near 1"])
def test_a_coefficient_near_its_ends_keeps_its_accuracy(distance, mirrored):
    beta = 1.0 - distance if mirrored else distance
    loss, dhidden = errors(0.05, 3.0, PurifiedConfig(beta=beta))
    assert loss < 1e-5 and dhidden < 2e-5
    loss, dhidden = errors(0.5, 6.0, PurifiedConfig(beta=beta))
    # far apart, log(beta + (1 − beta)·e^−|t|) is formed from a 1 − beta that rounds at 6e-8: as much of beta is lost
    allowed = 2e-5 + BETA_RESOLUTION / distance
    assert loss < allowed and dhidden < allowed


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("distance", [BETA_RESOLUTION, 1e-9, 1e-300])
def test_a_coefficient_within_float32_of_an_end_is_that_end(end, distance):
    config = PurifiedConfig(beta=abs(end - distance))
    assert config == PurifiedConfig(beta=end) and math.copysign(1.0, config.beta) == 1.0
    assert PurifiedConfig(beta=1.0 - 10 * 0.1).beta == 0.0
    assert PurifiedConfig(beta=abs(end - 1.01 * BETA_RESOLUTION)).beta != end


@pytest.mark.parametrize("clip", [SIGMOID_CLIP, 1.01 * SIGMOID_CLIP, 1e4, 1e6, 1e8, 1e30, 3e38])
@pytest.mark.parametrize("spread", [0.008, 1.0])
def test_a_wide_clip_does_not_cancel(clip, spread):
    loss, dhidden = errors(spread, 3.0, PurifiedConfig(pmi_clip=clip))
    assert loss < 2e-5 and dhidden < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_is_added_in_float32(dtype):
    raw, bias = torch.randn(5, 33).to(dtype), torch.randn(33).to(dtype)
    logits = tempered_logits(raw, bias, LogitTransform(), RowOptions())
    assert logits.dtype == torch.float32
    assert relative_l2(logits, raw.double() + bias.double()) < 1e-7
