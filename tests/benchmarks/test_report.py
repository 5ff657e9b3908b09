"""Tables, goals, plots and the page, from results made by hand; and the page in the repository from its own files."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from popsd_benchmarks.cases import FLOOR, SHAPES, Case
from popsd_benchmarks.providers import PROVIDERS
from popsd_benchmarks.report import goals, page, plots, tables
from popsd_benchmarks.results import Cell, Results, Rounds, load

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "benchmarks" / "RESULTS.md"
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
CPU = Case(loss="purified", shape=SHAPES["cpu"])
GPU = Case(loss="purified", shape=SHAPES["qwen3-1.7b"], dtype="bfloat16", device="cuda")
META = {
    "versions": {"popsd": "0.1.0", "torch": "2.13.0"},
    "device": "Some CPU, 2 cores",
    "threads": 2,
    "commit": "abc123",
    "command": "popsd bench --full",
    "date": "2026-11-24T12:00:00+00:00",
}


def timed(provider, seconds, case=CPU, part="table", **fields):
    """A cell that took ``seconds``, give or take a tenth."""
    rounds = [0.9 * seconds, seconds, 1.1 * seconds]
    return Cell(
        part=part,
        provider=provider,
        case=case,
        seconds=Rounds.of(rounds),
        **fields,
    )


def the_table():
    return [
        timed(FLOOR, 0.8),
        timed("popsd-torch", 1.0, peak_mib=120.0, errors={"loss": 1e-6, "dhidden": 2e-6}),
        timed("eager", 4.0, peak_mib=970.0, errors={"loss": 1e-6, "dhidden": 3e-6}),
        timed(
            "eager-compiled", 3.0, status="inaccurate", note="dH off by 4e-2", errors={"loss": 1e-6, "dhidden": 4e-2}
        ),
        Cell(part="table", provider="trl", case=CPU, status="unsupported", note="two distributions only"),
        Cell(part="table", provider="liger-triton", case=CPU, status="unsupported", note="two distributions only"),
        Cell(part="table", provider="orda", case=CPU, status="not installed", note="No module named 'orda_kernel'"),
    ]


def the_curves():
    cells = []
    for spread in (0.02, 0.2, 2.0):
        case = replace(CPU, dtype="bfloat16", spread=spread)
        for provider, error in (("popsd-torch", 2e-3), ("eager", 2.5e-3), ("eager-16bit-logits", 0.02 / spread)):
            errors = {"loss": error, "dhidden": error}
            cells.append(Cell(part="accuracy", provider=provider, case=case, errors=errors, kl=spread**2))
    for tokens in (256, 512, 1024, 2048):
        case = replace(CPU, shape=replace(CPU.shape, tokens=tokens))
        dhidden_mib = tokens * 512 * 4 / 2**20
        cells.append(timed("popsd-torch", tokens / 512, case, "tokens", peak_mib=96 + dhidden_mib))
        if tokens < 2048:
            cells.append(timed("eager", tokens / 128, case, "tokens", peak_mib=2.0 * tokens))
        else:
            cells.append(Cell(part="tokens", provider="eager", case=case, status="out of memory"))
    return cells


@pytest.fixture
def results():
    return Results(dict(META), [*the_table(), *the_curves()])


def test_a_case_as_a_table():
    table = tables.case_table(CPU, the_table())
    assert table.title.endswith("frozen head, float32: cpu, N = 512, V = 32,768, D = 512")
    assert table.rows[1:] == [
        ["matmuls (floor)", "800 (760–840)", "0.80", "100%", "0.0859", "–", "–", "–"],
        ["popsd-torch", "1,000 (950–1,050)", "1.00", "80%", "0.0687", "120", "1.0e-06", "2.0e-06"],
        ["eager-compiled", "3,000 (2,850–3,150), inaccurate", "3.00", "27%", "0.0229", "–", "1.0e-06", "4.0e-02"],
        ["eager", "4,000 (3,800–4,200)", "4.00", "20%", "0.0172", "970", "1.0e-06", "3.0e-06"],
    ]
    assert table.notes == ["eager-compiled: dH off by 4e-2"]
    assert table.absent == [
        "unsupported (two distributions only): trl, liger-triton",
        "not installed (No module named 'orda_kernel'): orda",
    ]


def test_a_remark_stands_once():
    notes = ["busy", "busy; compiled", "busy"]
    cells = [timed(name, 1.0, note=note) for name, note in zip(("popsd-torch", "eager", "trl"), notes, strict=True)]
    assert tables.case_table(CPU, cells).notes == ["all: busy", "eager: compiled"]
    assert tables.case_table(CPU, [*cells, timed("orda", 2.0)]).notes == [
        "popsd-torch, eager, trl: busy",
        "eager: compiled",
    ]


def test_other_processes_are_named():
    cells = [timed("popsd-torch", 1.0, others=0.38), timed("eager", 2.0, others=0.02)]
    assert tables.disturbance(cells) == "other processes had 38% of the processors meanwhile"
    assert tables.disturbance(cells[1:]) == tables.disturbance([]) == ""
    assert tables.case_table(CPU, cells).notes == [f"popsd-torch: {tables.disturbance(cells)}"]
    assert "held 38% of the GPU's memory" in tables.disturbance([timed("popsd-triton", 1.0, GPU, others=0.38)])


def test_a_picture_says_what_its_table_says_and_where_it_was_measured(results):
    pytest.importorskip("matplotlib")
    figure, axes, title, cells = plots.figures(results)["table-purified-frozen-float32"]()
    shown = [text.get_text() for text in figure.axes[0].texts]
    table = {row[0].split()[0]: row for row in tables.case_table(CPU, the_table()).rows}
    for cell in cells:
        text = next(x for x in shown if x.startswith(tables.significant(tables.milliseconds(cell))))
        ratio = table[cell.provider][2]
        assert table[cell.provider][1].startswith(text.split()[0]) and (
            cell.provider == "popsd-torch" or f"{ratio}×" in text
        )
    (bars,) = (x for x in figure.axes[0].containers if hasattr(x, "errorbar") and x.errorbar)
    (whiskers,) = (line.get_segments() for line in bars.errorbar[2])
    assert [x[0][0] for x in whiskers] == pytest.approx(
        [1e3 * c.seconds.low for c in sorted(cells, key=tables.milliseconds, reverse=True)]
    )
    cells = [replace(cell, others=0.5) for cell in cells]
    plots._finish(figure, axes, title, cells, META, Path("/dev/null"))
    words = " ".join(figure._supxlabel.get_text().split())
    for expected in (
        "Some CPU, 2 cores, 2 threads",
        "torch 2.13.0",
        "abc123",
        "medians of 3 rounds",
        "other processes had 50%",
    ):
        assert expected in words


def test_results_hold_nothing_but_what_was_measured_of_what_there_is():
    for path in FILES:
        assert {cell.provider for cell in load(path).cells} <= PROVIDERS.keys()
        assert not any("estimate" in cell.note for cell in load(path).cells)


def test_a_trained_head_has_another_column():
    cell = timed("popsd-torch", 1.0, replace(CPU, trainable_head=True), errors={"dweight": 3e-6})
    (header, row) = tables.case_table(cell.case, [cell]).rows
    assert header[-1] == "dW error" and row[-1] == "3.0e-06"


def test_every_measured_part_has_a_table(results):
    profile = timed("popsd-torch", 1.0, part="profile")
    profile.kernels = [{"name": "aten::mm<a|b>", "seconds": 0.5, "calls": 4, "share": 0.5, "gb_per_s": 1234.5}]
    found = tables.all_tables([*results.cells, profile])
    by_title = {table.title: table for table in found}
    assert len(found) == len(by_title) == 5
    accuracy = next(table for title, table in by_title.items() if "error of dH" in title)
    assert accuracy.rows[0][1:] == ["4.0e-04", "4.0e-02", "4.0e+00"]
    assert accuracy.rows[-1] == ["eager-16bit-logits", "1.0e+00", "1.0e-01", "1.0e-02"]
    times = next(table for title, table in by_title.items() if title.endswith("against N (V = 32,768, D = 512): time"))
    assert times.rows == [
        ["ms at N =", "256", "512", "1,024", "2,048"],
        ["popsd-torch", "500", "1,000", "2,000", "4,000"],
        ["eager", "2,000", "4,000", "8,000", "out of memory"],
    ]
    assert found[-1].rows[1] == ["aten::mm<a|b>", "500", "4", "50%", "1,234", "–"]
    assert r"aten::mm\<a\|b>" in tables.as_markdown(found[-1].rows)


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (99.96, "100.0"), (12.34, "12.3"), (0.1234, "0.12")])
def test_three_digits(value, text):
    assert tables.significant(value) == text


def test_csv_has_a_row_per_cell(results, tmp_path):
    tables.write_csv(results.cells, tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == len(results.cells)
    assert (rows[2]["provider"], rows[2]["seconds_median"]) == ("eager", "4.0")
    assert (rows[4]["status"], rows[4]["seconds_median"]) == ("unsupported", "")
    tables.write_csv([replace(results.cells[4], note="=1+1"), results.cells[4]], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        assert next(csv.DictReader(file))["note"] == "'=1+1", "a spreadsheet would compute it"


def verdicts(device, cells, records=()):
    return {verdict.claim: verdict for verdict in goals.judge(device, Results(META, list(cells), list(records)))}


def test_goals_are_judged_by_the_ratio_of_the_tables(results):
    found = verdicts("cpu", results.cells)
    matmuls = found["purified, frozen head: time / the four bare matmuls"]
    assert matmuls.value == pytest.approx(1.25) and matmuls.word == "met"
    assert found["purified, frozen head: time / eager"].value == pytest.approx(0.25)
    memory = found["purified, frozen head: peak memory / eager"]
    assert memory.value == pytest.approx(120 / 970) and memory.word == "met"
    assert found["two distributions, frozen head: time / TRL"].word == "not measured"
    best = found["purified, bfloat16: dH error / best peer's, any KL (2 % is a tie)"]
    assert best.value == pytest.approx(0.8), "popsd's other selves are no peers, and eager is the best of the others"


def test_goals_bite(results):
    slow = replace(CPU.shape, tokens=4096)
    late = timed("popsd-torch", 12.0, replace(CPU, shape=slow), "tokens", peak_mib=200.0)
    cells = [cell for cell in results.cells if cell.provider != FLOOR]
    found = verdicts("cpu", [*cells, timed(FLOOR, 0.7), late])
    assert found["purified, frozen head: time / the four bare matmuls"].word == "missed"
    time = found["purified: time per unit of N, at the largest N over at the smallest"]
    assert time.value == pytest.approx(1.5) and time.word == "missed"
    memory = found["purified: memory beyond dH, at the largest N over at the second largest"]
    assert memory.value == pytest.approx((200 - 8) / 96) and memory.word == "missed"


def test_another_shape_is_not_taken_for_the_goals(results):
    small = replace(CPU, shape=replace(CPU.shape, tokens=256))
    cells = [timed(FLOOR, 0.8, small), timed("popsd-torch", 1.0, small), timed("eager", 4.0, small)]
    assert {verdict.word for verdict in verdicts("cpu", cells).values()} == {"not measured"}
    assert {verdict.word for verdict in verdicts("cuda", results.cells).values()} == {"not measured"}


def test_gpu_goals_compare_four_distributions_with_two():
    two = replace(GPU, loss="two")
    cells = [
        timed(FLOOR, 0.8, GPU),
        timed("popsd-triton", 1.0, GPU, peak_mib=2048 + 32.0),
        timed("trl", 2.5, two),
        timed("liger-triton", 0.9, two),
    ]
    found = verdicts("cuda", cells)
    at = "purified, frozen head, V = 151,936, D = 2,048"
    assert found[f"{at}: time / TRL with two distributions"].value == pytest.approx(0.4)
    assert found[f"{at}: time / Liger fused with two"].word == "missed"
    assert found[f"{at}: GiB beyond inputs and dH"].value == pytest.approx(2.0), "dH takes 32 MiB"


def test_every_provider_has_a_look_of_its_own():
    looks = {name: plots.look(name) for name in PROVIDERS}
    assert PROVIDERS.keys() == plots.LOOKS.keys(), "help lists the names of these, without torch"
    ours = {"popsd-torch", "popsd-triton"}  # never in one plot: a device each
    others = [(look.colour, str(look.line)) for name, look in looks.items() if name not in ours]
    assert len(set(others)) == len(others) and plots.look("popsd-torch") == plots.look("popsd-triton")


def test_plots_are_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = plots.draw(results, tmp_path, "cpu-")
    assert [path.name for path in drawn] == [
        "cpu-accuracy.png", "cpu-scaling-purified.png", "cpu-table-purified-frozen-float32.png"
    ]  # fmt: skip
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_page_says_what_was_not_measured(results, tmp_path):
    output = tmp_path / "RESULTS.md"
    text = page.page([(tmp_path / "results" / "cpu.json", results)], output)
    assert "Nothing on this page was measured on a GPU" in text
    assert "[results/cpu.json](results/cpu.json) | 2026-11-24 | Some CPU, 2 cores, 2 threads | abc123" in text
    assert "![accuracy](results/plots/cpu-accuracy.png)" in text
    assert "| CPU | purified, frozen head: time / eager | 0.33 | 0.25 | met | results/cpu.json |" in text
    assert "time / TRL with two distributions | 0.5 | – | not measured |" in text
    assert "- not installed (No module named 'orda_kernel'): orda" in text
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.md").write_text("Missed because of the tide.\n")
    assert "\n\nMissed because of the tide.\n\n" in page.page([(tmp_path / "results" / "cpu.json", results)], output)
    on_gpu = Results({**META, "device": "Some GPU"}, [timed("popsd-triton", 1.0, GPU)])
    assert "was measured on a GPU" not in page.page(
        [(tmp_path / "a.json", results), (tmp_path / "b.json", on_gpu)], output
    )


def test_the_command_writes_page_and_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    results.save(tmp_path / "cpu.json")
    assert page.main([str(tmp_path / "cpu.json"), "--output", str(tmp_path / "RESULTS.md")]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"plots/{path.name})" in text for path in (tmp_path / "plots").iterdir())
    assert len(list((tmp_path / "plots").iterdir())) == text.count("![")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"versions": {}}')
    with pytest.raises(ValueError, match=r"old.json: expected results with meta and cells"):
        page.main([str(tmp_path / "old.json")])


def test_the_page_in_the_repository_is_that_of_its_files():
    files = page.read(FILES)
    assert files and PAGE.read_text() == page.page(files, PAGE), "stale: run `make report`"
    drawn = {f"{path.stem}-{name}.png" for path, results in files for name in plots.figures(results)}
    assert {path.name for path in (PAGE.parent / "results" / page.PLOTS).iterdir()} == drawn
