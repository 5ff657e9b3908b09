"""The run: what fails fails alone, what is known is not measured again, unknown names are refused, files survive."""

import json
from dataclasses import replace

import pytest
import torch

from popsd_benchmarks import others, suite
from popsd_benchmarks import results as results_module
from popsd_benchmarks.cases import SHAPES, Case, operations
from popsd_benchmarks.measure import FIRST_STEP, Effort, UnusableError, add_kernels, failure, in_turns, measure
from popsd_benchmarks.providers import PROVIDERS
from popsd_benchmarks.providers.base import Provider
from popsd_benchmarks.results import FINISHED, Cell, Results, load, ratio

TINY = SHAPES["tiny"]
CASE = Case(loss="two", shape=TINY)
FAST = Effort(rounds=2, peak=False)
OURS, FLOOR = PROVIDERS["popsd-torch"], PROVIDERS["matmuls"]


class Broken(Provider):
    """Raises in its n-th step; until then it does what popsd does."""

    def __init__(self, error, after=0):
        super().__init__("broken")
        self.__dict__.update(error=error, after=after)

    def prepare(self, problem):
        inner, calls = OURS.prepare(problem), []

        def step():
            calls.append(1)
            if len(calls) > self.after:
                raise self.error
            return inner()

        return step


@pytest.mark.parametrize("after", [0, 2], ids=["at once", "in a round"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ZeroDivisionError("of its own making"), "failed"),
    ],
)
def test_a_provider_that_fails_fails_alone(error, status, after):
    ours, broken, floor = measure("table", CASE, [OURS, Broken(error, after), FLOOR], FAST)
    assert broken.status == status and type(error).__name__ in broken.note
    assert not broken.seconds
    assert ours.status == floor.status == "ok" and ours.seconds.count == floor.seconds.count == 2


class AcceleratorError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), None),
        (AcceleratorError("CUDA error: out of memory"), "out of memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory"),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), None),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), None),
        (RuntimeError("../aten/src/ATen/native/cuda/Indexing.cu: device-side assert triggered"), None),
        (RuntimeError("out of resource: shared memory, Required: 240000, Hardware limit: 232448"), "failed"),
        (ValueError("beta: expected a number"), "failed"),
    ],
)
def test_what_a_process_survives(error, expected):
    assert failure(error) == expected


@pytest.mark.parametrize("after", [0, 1], ids=["at once", "in a round"])
def test_a_cuda_failure_ends_the_process_and_is_kept(after):
    kept = []
    broken = Broken(AcceleratorError("CUDA error: unspecified launch failure"), after)
    with pytest.raises(UnusableError, match="unspecified launch failure"):
        list(measure("table", CASE, [OURS, broken, FLOOR], FAST, keep=kept.append))
    assert (kept[-1].provider, kept[-1].status) == ("broken", "failed")
    assert (kept[0].provider, kept[0].status, kept[0].note) == (OURS.name, "stopped", FIRST_STEP)


def test_a_ratio_is_what_the_times_beside_it_say():
    ours, floor = measure("table", CASE, [OURS, FLOOR], FAST)
    assert ratio(floor, ours) == floor.seconds.median / ours.seconds.median and ratio(ours, ours) == 1.0
    assert ratio(None, ours) is None and ratio(replace(floor, seconds=None), ours) is None
    assert ours.tflops == pytest.approx(operations(CASE) / ours.seconds.median / 1e12)
    assert ours.kl > 0 and set(ours.errors) == {"loss", "dhidden"} and not floor.errors


def test_a_wrong_answer_says_so_beside_its_speed():
    case = Case(loss="two", shape=TINY, dtype="bfloat16")
    wrong = next(measure("table", case, [PROVIDERS["eager-16bit-logits"]], FAST))
    assert wrong.status == "inaccurate" and "dhidden" in wrong.note and wrong.seconds.count == 2
    ungated = next(measure("accuracy", case, [PROVIDERS["eager-16bit-logits"]], Effort(rounds=0)))
    assert ungated.status == "ok" and ungated.errors["dhidden"] > 1e-2


def test_full_logits_are_not_tried_where_they_cannot_fit(monkeypatch):
    monkeypatch.setattr("popsd_benchmarks.measure._memory_of_machine", lambda: 2**20)
    ours, eager = measure("table", CASE, [OURS, PROVIDERS["eager"]], FAST)
    assert eager.status == "out of memory" and "GiB" in eager.note and ours.status == "ok"


def test_what_cannot_run_here_is_listed():
    unsupported = next(measure("table", CASE, [PROVIDERS["popsd-triton"]], FAST))
    assert unsupported.status == "unsupported" and "GPU" in unsupported.note

    absent = next(measure("table", CASE, [Provider("absent", module="no_such_package")], FAST))
    assert absent.status == "not installed" and "no_such_package" in absent.note
    left_out = next(
        measure("table", CASE, [PROVIDERS["eager-compiled"]], Effort(rounds=1, peak=False, compilers=False))
    )
    assert left_out.status == "left out"


def test_rounds_start_in_turn():
    assert list(in_turns("abc", 2)) == [(i, x) for i, order in enumerate(("abc", "bca", "cab")) for x in order]


def test_late_cases_stop_after_a_whole_round():
    ours, floor = measure("table", CASE, [OURS, FLOOR], Effort(rounds=50, seconds=0.0, peak=False))
    assert ours.seconds.count == floor.seconds.count == 3


def test_profile_names_where_the_time_goes():
    cell = next(measure("profile", CASE, [OURS], Effort(rounds=1, peak=False)))
    add_kernels(cell, OURS)
    assert sum(row["share"] for row in cell.kernels) == pytest.approx(1.0)
    assert any("mm" in row["name"] for row in cell.kernels) and cell.seconds.count == 1


@pytest.mark.slow
def test_quick_run_end_to_end_and_resumed(tmp_path):
    out, seen = tmp_path / "results.json", []
    names = ["eager", "eager-16bit-logits", "popsd-triton"]
    first = suite.run(["table"], ["tiny"], names, out=out, progress=lambda *x: seen.append(x))
    assert len(first.cells) == 2 * 5 == seen[-1][0] == seen[-1][1]
    by_name = {cell.provider: cell for cell in first.cells if cell.case.loss == "purified"}
    assert by_name["popsd-torch"].peak_mib > 0 and by_name["eager"].seconds
    assert by_name["popsd-triton"].status == "unsupported"
    assert {"versions", "device", "threads", "commit", "command", "date", "load"} <= set(first.meta)

    content = json.loads(out.read_text())  # as after a kill: the last cell never came
    content["cells"] = [row for row in content["cells"] if (row["provider"], row["case"]["loss"]) != ("eager", "two")]
    out.write_text(json.dumps(content))
    seen.clear()
    again = suite.run(["table"], ["tiny"], names, out=out, progress=lambda *x: seen.append(x))
    finished = {(cell.provider, cell.case.loss) for _, planned, cell in seen if planned == 3 and cell.status == "ok"}
    assert finished == {(name, "two") for name in ("popsd-torch", "matmuls", "eager")}, "what is compared is of one run"
    assert {c.key for c in again.cells} == {c.key for c in first.cells} == {c.key for c in load(out).cells}
    assert len(again.meta["continued"]) == 1


def test_failed_cells_are_measured_again_and_finished_ones_are_not(tmp_path):
    out = tmp_path / "results.json"
    item = suite.Item("table", CASE, FAST)
    results = Results({})
    suite.run_items([item], [OURS, Broken(ZeroDivisionError()), FLOOR], results, out=out)
    assert [cell.status for cell in results.cells] == ["ok", "failed", "ok"]
    first, seen = results.cells[0].seconds, []

    def again(*providers, **options):
        seen.clear()
        suite.run_items([item], providers, results, out=out, progress=lambda *x: seen.append(x[2].provider), **options)
        return seen

    assert again(OURS, Broken(ZeroDivisionError()), FLOOR, skip_failed=True) == []
    assert results.cells[0].seconds == first
    assert again(OURS, Broken(ZeroDivisionError(), after=99), FLOOR)[-3:] == [OURS.name, "broken", FLOOR.name]
    assert [cell.status for cell in load(out).cells] == ["ok", "ok", "ok"]
    assert results.cells[0].seconds != first, "times that are compared come from one run"


def test_times_of_another_run_are_measured_again_or_go():
    item, results, mine = suite.Item("table", CASE, FAST), Results({}), replace(PROVIDERS["eager"], name="mine")
    suite.run_items([item], [OURS, FLOOR, PROVIDERS["eager"], mine], results)
    assert len(results.cells) == 4
    suite.run_items([item], [OURS, FLOOR, Broken(ZeroDivisionError())], results)
    assert {cell.provider for cell in results.cells} == {OURS.name, FLOOR.name, "eager", "broken"}
    assert {cell.seconds.count for cell in results.cells if cell.seconds} == {2}
    before = {cell.provider: cell.seconds for cell in results.cells}
    suite.run_items([item], [OURS, FLOOR, mine], results, whole=False)
    assert {c.provider: c.seconds for c in results.cells if c.provider != "mine"} == before and len(results.cells) == 5
    accuracy = suite.Item("accuracy", CASE, Effort(rounds=0))
    suite.run_items([accuracy], [OURS], results)
    seen = []
    suite.run_items([accuracy], [OURS, PROVIDERS["eager"]], results, progress=lambda *x: seen.append(x[2].provider))
    assert set(seen) == {"eager"}, "errors are not compared with one another"


def test_results_survive_a_round_trip(tmp_path):
    results = Results({"device": "x"})
    suite.run_items([suite.Item("table", CASE, FAST)], [OURS, FLOOR], results)
    results.record("probe", "copy", gb_per_s=3.0)
    results.record("probe", "copy", status="failed")
    results.save(tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results and len(results.records) == 1
    assert results.found("probe", "copy")["status"] == "failed" and not results.found("probe", "square")


def test_every_cell_is_on_disk_before_it_is_shown(tmp_path):
    out = tmp_path / "results.json"

    def finished():
        return sum(cell.status in FINISHED for cell in load(out).cells)

    def stop(done, planned, cell):
        assert finished() == done
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run(["accuracy"], ["tiny"], ["popsd-torch"], out=out, progress=stop)
    assert finished() == 2


def test_seconds_are_shared_out_and_when_they_are_over_no_other_case_starts(monkeypatch):
    assert suite.run(["accuracy"], ["tiny"], ["popsd-torch"], seconds=-1.0).cells == []
    given, now = [], [100.0]

    def measured(part, case, providers, effort, keep):
        given.append((part, effort.rounds, effort.seconds))
        now[0] += 30.0
        yield from (Cell(part=part, provider=provider.name, case=case) for provider in providers)

    monkeypatch.setattr(suite, "measure", measured)
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])
    work = [suite.Item("table", replace(CASE, spread=spread), FAST) for spread in (0.1, 0.2, 0.3, 0.4)]
    suite.run_items(work, [OURS], Results({}), seconds=80.0)
    assert given == [
        ("table", suite.MOST_ROUNDS, 20.0),
        ("table", suite.MOST_ROUNDS, pytest.approx(50 / 3)),
        ("table", suite.MOST_ROUNDS, 10.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ["tables"]}, r"parts: .*table, accuracy.*got tables"),
        ({"shapes": ["gpt-5"]}, r"shapes: .*qwen3-1\.7b.*got gpt-5"),
        ({"providers": ["nobody"]}, r"providers: .*liger-chunked.*got nobody"),
        ({"device": "tpu"}, r"device: .*cpu, cuda; got tpu"),
    ],
)
def test_unknown_names_are_refused_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        suite.run(**{"parts": ["table"]} | arguments)


def test_a_file_from_elsewhere_is_not_continued(tmp_path):
    out = tmp_path / "results.json"
    Results({**results_module.describe("cpu"), "device": "another"}).save(out)
    with pytest.raises(ValueError, match="another"):
        suite.run(["accuracy"], ["tiny"], out=out)
    out.write_text("{}")
    with pytest.raises(ValueError, match="expected results"):
        suite.run(["accuracy"], ["tiny"], out=out)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("part", suite.PARTS)
def test_plan_has_no_case_twice(part, device, quick):
    found = list(suite.cases(part, [], quick=quick, device=device))
    keys = [Cell(part=part, provider="x", case=item.case).key for item in found]
    assert found and len(set(keys)) == len(keys)
    assert all(item.case.device == device for item in found)


def test_scaling_moves_one_dimension_over_the_range_asked_for():
    for part, least, most in (("tokens", 256, 65536), ("vocab", 32768, 262144)):
        sizes = [getattr(i.case.shape, part) for i in suite.cases(part, [], quick=False, device="cuda")]
        assert min(sizes) == least and max(sizes) == most


def test_command_is_recorded_without_this_machines_folders(monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["x", "/home/me/run.py", "--out=/tmp/a/b.json", "runs/bench", "/tmp/c/"])
    assert results_module._command() == "python run.py --out=b.json runs/bench "


def test_what_other_processes_took_is_counted(monkeypatch):
    """A second of two processors, of which this process used .4 and others .6 and then 1.6."""
    clock = iter([(10.0, 100.0, 200.0), (10.4, 101.0, 202.0), (10.4, 102.0, 202.0), (10.0, 100.0, 200.1)])
    monkeypatch.setattr(others, "_seconds", lambda: next(clock))
    watched = others.Others("cpu")
    assert watched.share() == pytest.approx(0.3) and watched.share() == pytest.approx(0.8)
    assert watched.share() is None, "too short to say"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(others, "_seconds", lambda: (0.0, 0.0, 0.0))
    assert others.Others("cuda").share() == pytest.approx(4 / 16)


def test_the_systems_clock_is_read():
    own, busy, time = others._seconds()
    assert 0 < own < busy <= time
