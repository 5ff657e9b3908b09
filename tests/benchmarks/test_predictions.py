"""The predictions in kernels/PERFORMANCE.md are those that a run on a GPU is compared with."""

from pathlib import Path

import pytest

from popsd_benchmarks.cases import Case, Shape
from popsd_benchmarks.results import Cell

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    ("popsd-triton", "purified", 0.5): "purified, JSD: popsd, two sweeps",
    ("popsd-triton", "purified", 0.0): "purified, forward KL: popsd, two sweeps",
    ("popsd-single-read", "purified", 0.5): "purified, JSD: popsd, single read",
    ("popsd-triton", "two", 0.5): "two distributions, JSD: popsd, two sweeps",
    ("trl", "two", 0.5): "two distributions, JSD: TRL 1.16",
    ("liger-triton", "two", 0.5): "two distributions, JSD: Liger 0.8.5",
}


@pytest.mark.parametrize("card", ["H100", "H200"])
@pytest.mark.parametrize(("provider", "loss", "beta"), ROWS)
def test_the_tables_are_the_arithmetic(card, provider, loss, beta, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    import predictions

    def milliseconds(name, width):
        shape = Shape(name="x", tokens=8192, vocab=151936, width=width)
        case = Case(loss=loss, shape=shape, beta=beta, dtype="bfloat16", device="cuda")
        return predictions.milliseconds(Cell(part="headline", provider=name, case=case), predictions.CARDS[card])

    times = [(milliseconds(provider, width), milliseconds("matmuls", width)) for width in (2048, 2560, 4096)]
    figures = " | ".join(f"{time:.1f} ({time / floor:.2f})" for time, floor in times)
    text = (ROOT / "kernels" / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert f"| {ROWS[provider, loss, beta]} | {figures} |" in text.split(f"| {card}, ms")[1].split("\n\n")[0]
