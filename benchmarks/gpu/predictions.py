"""What is expected, written down before a GPU ran any of it, and how what was measured compares.

Milliseconds are arithmetic: operations at a sustained rate, 40 % of the bytes that matmuls write (the rest hides behind
them), and the sweeps' bytes at 87 % of a copy's rate. TRL's and Liger's count their own matmuls and passes. The single read
takes the longer of its bytes and its instructions: on an H100 6.7 ms and, with every lane busy at every clock, 4.3 ms for
8,192 tokens; on an H200 4.7 and 4.3 ms with four distributions, and with two the instructions decide, 4.3 against 3.3 ms.
"""

from typing import Any, NamedTuple

from popsd.engine.workspace import fill
from popsd_benchmarks.cases import OURS, matmuls, operations
from popsd_benchmarks.report import goals, tables
from popsd_benchmarks.results import Cell, Results, ratio


class Rates(NamedTuple):
    """tflops: sustained by bf16 matmuls of these sizes. tbps: of a copy, bytes read and written. square: of 8192³."""

    tflops: float
    tbps: float
    square: float


CARDS = {"H100": Rates(750, 3.0, 798), "H200": Rates(790, 4.3, 790)}
EXPOSED, SWEPT, MULTIPROCESSORS = 0.40, 0.87, 132
SWEEP_BYTES = {  # per token and row of the vocabulary: between 0 and 1, at 0
    "popsd-triton": {"purified": (34, 26), "two": (26, 18)},
    "popsd-graph": {"purified": (34, 26), "two": (26, 18)},
    "popsd-single-read": {"purified": (14, 14), "two": (10, 10)},
    "trl": {"two": (31, 24)},
    "liger-triton": {"two": (107, 107)},
}
INSTRUCTIONS = {"popsd-single-read": 100}
"""Per token and row of the vocabulary, executed. Its bytes are so few that issuing these may take longer."""
ISSUED = MULTIPROCESSORS * 128 * 1.7e9
"""Instructions a second, at most: lanes of all multiprocessors, at 1.7 GHz."""
TRL_MATMULS = (7, 5)
LIGER_HEAD_READS = {2048: 192, 2560: 192, 4096: 96}
"""Times that three matmuls of Liger's chunks (128 rows, 256 at D = 4096) read the head, for 8,192 tokens."""


def rates(device: str) -> Rates | None:
    return next((found for name, found in CARDS.items() if name in device), None)


def milliseconds(cell: Cell, card: Rates) -> float | None:
    """Of a provider on a case, where there is a prediction."""
    case, shape = cell.case, cell.case.shape
    if case.dtype != "bfloat16" or case.trainable_head or shape.softcap is not None:
        return None
    entries, count = shape.tokens * shape.vocab * 1e-9, matmuls(case)
    one = operations(case) / count / card.tflops * 1e-9

    def matmul_time(number: int) -> float:
        """With all their outputs in float32 but the last one's."""
        return number * one + EXPOSED * 4 * (number - 1) * entries / card.tbps

    if cell.provider == "matmuls":
        return matmul_time(count)
    found = SWEEP_BYTES.get(cell.provider, {}).get(case.loss)
    if found is None:
        return None
    end = int(case.beta in (0.0, 1.0))
    issue = 1e12 * entries * INSTRUCTIONS.get(cell.provider, 0) / ISSUED
    swept = max(found[end] * entries / card.tbps / SWEPT, issue)
    if cell.provider == "liger-triton":
        if shape.width not in LIGER_HEAD_READS:
            return None
        reads = LIGER_HEAD_READS[shape.width] * shape.tokens / 8192 * shape.vocab * shape.width * 2e-9 / card.tbps
        return max(count * one, reads) + swept
    return matmul_time(TRL_MATMULS[end] if cell.provider == "trl" else count) + swept


def record_predictions(row: dict[str, Any], card: Rates) -> dict[str, float]:
    """The figures of a record that are predicted."""
    if row["part"] == "probe":
        if "rows" in row:
            return {"tflops": card.tflops * fill(row["rows"], row["columns"], MULTIPROCESSORS)}
        return {"gb_per_s": 1e3 * card.tbps, "tflops": card.square}
    return {"share_of_copy": SWEPT} if row["part"] == "dram" else {}


def comparison(results: Results) -> list[str]:
    """A line per goal that was measured, per case and per kind of record; in brackets what was predicted."""
    card = rates(results.meta["device"])
    lines = [
        f"goal {verdict.word}: {verdict.claim}: {verdict.value:.3g}, at most {verdict.most:g}"
        for verdict in goals.judge("cuda", results)
        if verdict.value is not None
    ]
    groups: dict[str, list[str]] = {}
    for cell in results.cells:
        where = f"{cell.part}, {tables.case_title(cell.case)}"
        ours = next((x for x in results.cells if x.key == (cell.part, OURS["cuda"], cell.case)), None)
        groups.setdefault(where, []).append(f"{cell.provider} {_of_cell(cell, card, ratio(cell, ours))}")
    for row in results.records:
        if row["part"] != "parts":
            where, _, name = f"{row['part']} {row['name']}".partition(" V " if row["part"] == "probe" else " ")
            groups.setdefault(where if name else "probe", []).append(f"{name or row['name']} {_of_record(row, card)}")
    lines += ["Measured (predicted); times in ms, x: of popsd's own"]
    lines += [f"{where}: {', '.join(found)}"[:440] for where, found in groups.items()]
    parts = [row for row in results.records if row["part"] == "parts" and row["status"] != "ok"]
    return lines + [f"part {row['name']}: {row['note']}" for row in parts]


def _of_cell(cell: Cell, card: Rates | None, times_ours: float | None) -> str:
    if cell.part == "accuracy" and "dhidden" in cell.errors:
        return f"KL {cell.kl or 0.0:.1e} dH {cell.errors['dhidden']:.1e}"
    if cell.seconds is None or cell.status not in ("ok", "inaccurate"):
        return cell.status
    expected = None if card is None else milliseconds(cell, card)
    shown = f"{1e3 * cell.seconds.median:.1f}" + ("" if expected is None else f" ({expected:.1f})")
    shown += f" = {times_ours:.2f} x" if cell.part == "planning" and times_ours else ""
    return shown + ("" if cell.status == "ok" else " INACCURATE")


def _of_record(row: dict[str, Any], card: Rates | None) -> str:
    if row["status"] not in ("ok", "failed"):
        return str(row["status"])
    expected = {} if card is None else record_predictions(row, card)
    hidden = {"rows", "columns", "inner", *(["ms"] if "tflops" in row else [])}
    figures = {k: x for k, x in row.items() if isinstance(x, int | float) and k not in hidden}
    shown = (f"{x:.4g}" + (f" ({expected[k]:.4g})" if k in expected else "") + f" {k}" for k, x in figures.items())
    failed = ["FAILED", str(row.get("note", ""))[:60]] if row["status"] == "failed" else []
    return " ".join([*shown, *failed])
