import builtins
import re
import subprocess
import sys

import pytest

from popsd_integrations import cli

SCORE = {"accuracy": 0.5, "accuracy_greedy": 0.6, "markers": 7.0, "length": 22.0, "eos_rate": 0.9}
STEPS = [{"step": 1, "loss": 0.1, "student_entropy": 0.3} | {f"eval/{name}": value for name, value in SCORE.items()}]
STEPS[0] |= {f"decomposition/{n}": 1.0 for n in ("cos_total_reference", "cos_total_transferable", "reference_fraction")}
RESULTS = {
    **dict.fromkeys(("base", "opsd", "purified"), SCORE),
    "standard_error": 0.025,
    "per_seed": {"opsd": [SCORE], "purified": [SCORE]},
    "style_gap": {"base": 0.8, "teacher": 0.4, "reference": 0.2, "target": 0.9},
    "steps": {"opsd": [STEPS], "purified": [STEPS]},
    "example": {
        "question": "x",
        "answer": 1,
        "wanted": True,
        "completions": {x: {"text": "ANS 1", "correct": True, "tokens": 2} for x in ("base", "opsd", "purified")},
    },
    "config": {"max_steps": 1, "batch_size": 2},
    "seconds": {"warm-up": 1.0, "total": 2.0},
}


@pytest.fixture
def experiment(monkeypatch):
    """The experiment, replaced by its results; returns what it was called with."""
    pytest.importorskip("transformers")
    from popsd_integrations.miniature import experiment

    calls = []

    def run(config, output_dir, cache_dir, *, processes):
        calls.append((config, output_dir, cache_dir, processes))
        output_dir.mkdir(parents=True)
        return RESULTS

    monkeypatch.setattr(experiment, "run_experiment", run)
    return calls


def without(monkeypatch, package):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_demo_passes_options_on_and_writes_the_report(experiment, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    output = tmp_path / "out"
    arguments = [
        "demo",
        "--output-dir",
        str(output),
        "--num-seeds",
        "2",
        "--use-peft",
        "--warmup-seed",
        "1",
        "--num-processes",
        "1",
    ]
    assert cli.main(arguments) == 0
    ((config, folder, cache, processes),) = experiment
    assert (config.num_seeds, config.lora_rank, config.learning_rate, config.warmup.seed) == (2, 8, 1e-3, 1)
    assert (folder, cache, processes) == (output, tmp_path / "xdg" / "popsd", 1)
    assert {path.name for path in output.iterdir()} == {"report.html", "outcome.png", "diagnostics.png"}
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "purified OPSD" in printed and "a design choice in the synthetic data" in printed and "report.html" in printed
    )


def test_demo_without_matplotlib_skips_the_plots_and_says_so(experiment, tmp_path, monkeypatch, capsys):
    without(monkeypatch, "matplotlib")
    options = ["--cache_dir", str(tmp_path / "cache"), "--max_steps", "3"]
    assert cli.main(["demo", "--output_dir", str(tmp_path / "out"), *options]) == 0
    assert [(config.max_steps, cache) for config, _, cache, _ in experiment] == [(3, tmp_path / "cache")]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert "No plots: matplotlib is missing (pip install 'popsd[plots]')" in capsys.readouterr().out


def test_a_missing_extra_is_named(experiment, tmp_path, monkeypatch, capsys):
    from popsd_integrations.miniature import experiment as module

    def run(*arguments, **options):
        import transformers  # noqa: F401

    monkeypatch.setattr(module, "run_experiment", run)
    without(monkeypatch, "transformers")
    assert cli.main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "popsd demo needs transformers: pip install 'popsd[trl]'" in capsys.readouterr().err


def test_an_import_error_of_another_kind_is_not_hidden(experiment, tmp_path, monkeypatch):
    from popsd_integrations.miniature import experiment as module

    def run(*arguments, **options):
        raise ImportError("broken", name="something_else")

    monkeypatch.setattr(module, "run_experiment", run)
    with pytest.raises(ImportError, match=r"broken"):
        cli.main(["demo", "--output-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.json"), "No such file or directory: 'x.json'"),
        (ValueError("two\nlines"), "popsd demo: two lines"),
        (TypeError("floor: expected a number; got 'x'."), "popsd demo: floor: expected a number"),
        (TypeError("unhashable type: 'list'"), None),
        (ImportError("vLLM is not there. Install it."), "popsd demo: vLLM is not there. Install it."),
    ],
)
def test_what_a_user_can_cause_is_one_line(experiment, tmp_path, monkeypatch, capsys, error, message):
    from popsd_integrations.miniature import experiment as module

    def run(*arguments, **options):
        raise error

    monkeypatch.setattr(module, "run_experiment", run)
    arguments = ["demo", "--output-dir", str(tmp_path)]
    if message is None:  # a mistake in the program
        with pytest.raises(TypeError, match="unhashable"):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-seeds", "0"], "num_seeds: expected at least 1; got 0"),
        (["--num-processes", "0"], "num_processes: expected at least 1"),
    ],
)
def test_bad_input_is_an_exit_status_and_a_message(experiment, tmp_path, capsys, arguments, message):
    assert cli.main(["demo", "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert experiment == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_no_or_an_unknown_command_is_answered_with_the_choices(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("popsd: ") and ("See popsd --help" in line or "Did you mean" in line)


@pytest.fixture
def suite(monkeypatch):
    """The measurement, replaced by one finished cell; returns what it was called with, and may be told to fail."""
    from popsd_benchmarks import suite
    from popsd_benchmarks.cases import SHAPES, Case
    from popsd_benchmarks.results import Cell, Results, Rounds

    calls = []
    meta = {"versions": {"popsd": "0.1.0"}, "device": "Some CPU", "commit": "abc", "command": "", "date": "2026-11-24"}
    case = Case(loss="two", shape=SHAPES["tiny"])
    cell = Cell(part="table", provider="popsd-torch", case=case, seconds=Rounds.of([0.5]))
    absent = Cell(
        part="table", provider="orda", case=case, status="not installed", note="No module named 'orda_kernel'"
    )

    def run(parts, shapes, providers, *, quick, device, out, progress, seconds, begin):
        calls.append((parts, shapes, providers, quick, device, seconds))
        begin(Results(meta), 1)
        results = Results(meta, [cell, absent])
        results.save(out)
        progress(1, 2, cell)
        if providers == ["trl"]:
            raise KeyboardInterrupt
        progress(2, 2, absent)
        return results

    monkeypatch.setattr(suite, "run", run)
    return calls


def test_bench_shows_and_writes_what_was_measured(suite, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from popsd_benchmarks.command import PEERS

    assert cli.main(["bench", "--output-dir", str(tmp_path / "out")]) == 0
    assert suite == [(("table", "accuracy"), None, None, True, "cpu", 90.0)]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.json", "results.csv", "table-two-frozen-float32.png"}
    captured = capsys.readouterr()
    assert "1/2 table: two, frozen head, float32: popsd-torch 500 ms" in captured.err
    for text in (
        "generalised JSD, two distributions",
        "500 (500–500)",
        "Some CPU; commit abc",
        "2 cells",
        "results.csv",
        PEERS,
    ):
        assert text in captured.out


def test_bench_passes_its_options_on(suite, tmp_path):
    arguments = [
        "--full",
        "--device",
        "cuda",
        "--shapes",
        "tiny",
        "qwen3-8b",
        "--providers",
        "orda",
        "--output-dir",
        str(tmp_path),
    ]
    assert cli.main(["bench", *arguments]) == 0
    assert cli.main(["bench", "--parts", "vocab", "--output_dir", str(tmp_path / "other")]) == 0
    full, parts = suite
    assert full[1:] == (["tiny", "qwen3-8b"], ["orda"], False, "cuda", None) and {"tokens", "profile"} <= set(full[0])
    assert parts[0] == ["vocab"]


def test_bench_without_matplotlib_skips_the_plots_and_says_so(suite, tmp_path, monkeypatch, capsys):
    without(monkeypatch, "matplotlib")
    assert cli.main(["bench", "--output-dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.csv"}
    assert "No plots: matplotlib is missing (pip install 'popsd[bench]')" in capsys.readouterr().out


def test_an_interrupted_bench_keeps_what_it_has(suite, tmp_path, capsys):
    assert cli.main(["bench", "--providers", "trl", "--output-dir", str(tmp_path)]) == 130
    printed = capsys.readouterr().err
    assert f"1 cells are kept in {tmp_path / 'results.json'}" in printed and "the same command resumes" in printed
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("option", "valid"), [("--providers", "liger-chunked"), ("--shapes", "gemma-2-2b"), ("--parts", "accuracy")]
)
def test_bench_lists_the_valid_names_for_an_unknown_one(suite, tmp_path, capsys, option, valid):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", option, "nonsense", "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "'nonsense'" in printed and valid in printed
    assert suite == [] and not (tmp_path / "out").exists()


def test_help_and_errors_of_bench_need_no_torch():
    """Nor would one import it in vain: what cannot be is refused first."""
    code = "import sys; from popsd_integrations import cli\ntry: cli.main(['bench', *sys.argv[1:]])\n"
    code += "finally: assert 'torch' not in sys.modules"
    for arguments, status, message in (
        (["--help"], 0, "--seconds"),
        (["--seconds", "0"], 2, "argument --seconds: expected more than 0; got 0"),
        (["--providers", "liger"], 2, "invalid choice: 'liger'"),
        (["--provider", "mine:"], 2, "or module:Class"),
    ):
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert ended.returncode == status and message in ended.stdout + ended.stderr, ended


def test_bench_refuses_a_gpu_that_is_not_there(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["bench", "--device", "cuda", "--output-dir", str(tmp_path)]) == 2
    assert "expected 'cpu' on this machine; got 'cuda'" in capsys.readouterr().err


def test_bench_measures(tmp_path, capsys):
    """End to end, at the smallest shape; a second time it has nothing to do."""
    arguments = ["bench", "--parts", "accuracy", "--shapes", "tiny", "--providers", "eager", "--output-dir"]
    arguments.append(str(tmp_path))
    assert cli.main(arguments) == 0
    assert "eager" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_a_stranger_to_a_command_without_a_parser_of_its_own_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--gpu"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --gpu" in capsys.readouterr().err


def test_dashes_and_underscores_are_one_spelling_of_options_alone():
    given = [
        "evaluate",
        "--max-completion-length",
        "8",
        "--output-dir=runs/my-run",
        "--adapters",
        "my-run=a-b",
        "--",
        "-x-y",
    ]
    wanted = [
        "evaluate",
        "--max_completion_length",
        "8",
        "--output_dir=runs/my-run",
        "--adapters",
        "my-run=a-b",
        "--",
        "-x-y",
    ]
    assert cli.underscored(given) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "invalid choice: 'trian'.* Did you mean train?"),
        (
            ["evaluate", "--model_name_or_path", "x", "--num_generation", "1"],
            "unrecognized arguments: --num_generation 1. Did you mean --num_generations?",
        ),
        (["compare", "a", "--outputdir", "b"], "Did you mean --output_dir?"),
        (["demo", "--zebra"], "unrecognized arguments: --zebra."),
    ],
)
def test_a_misspelt_name_is_answered_with_what_was_meant(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert re.search(message.replace("?", r"\?"), capsys.readouterr().err)


def test_the_version_is_said_without_importing_torch():
    script = "import sys; from popsd_integrations import cli\n"
    script += "try: cli.main(['--version'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"popsd \d+\.\d+\.\d+\nFalse\n", done.stdout)
