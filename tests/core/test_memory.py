"""The promise of the library in one number: peak memory stays under the workspace, far from one [N, V] tensor."""

import pytest

from popsd_benchmarks.cases import Case, Shape
from popsd_benchmarks.memory import peak_on_cpu
from popsd_benchmarks.providers.ours import Popsd

SHAPE = Shape(name="memory", tokens=1024, vocab=32768, width=64)
WORKSPACE_MIB = 16
ONE_LOGIT_BUFFER_MIB = 4 * SHAPE.tokens * SHAPE.vocab / 2**20  # 128
DHIDDEN_MIB = 4 * SHAPE.tokens * SHAPE.width / 2**20


@pytest.mark.parametrize("loss", ["purified", "two"])
def test_peak_stays_within_the_workspace(loss):
    popsd = Popsd(name="popsd", impl="torch", workspace_mib=WORKSPACE_MIB)
    peak = peak_on_cpu(popsd, Case(loss=loss, shape=SHAPE))
    # one sweep's temporaries and the packing buffers of the matrix products come on top: 6 MiB here
    assert peak < WORKSPACE_MIB + DHIDDEN_MIB + 24
    assert peak < ONE_LOGIT_BUFFER_MIB / 3
    assert peak > WORKSPACE_MIB / 4, "so little that the measurement itself must be broken"
