"""The ``popsd`` command. Each sub-command imports what it needs when it runs, and names the extra that is missing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from popsd_integrations.commandline import examples
from popsd_integrations.commandline.suggest import Parser, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a problem that `doctor` found, 2 for bad input or a missing
    extra, 130 after an interrupt.
    """
    parser = Parser(
        prog="popsd", description="Purified on-policy self-distillation: train, look before and after, measure."
    )
    parser.add_argument("--version", action="version", version=f"popsd {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands.add_parser("demo", help="watch OPSD destroy a small reasoner and the purified loss keep it"))
    _add_diagnose(
        commands.add_parser("diagnose", help="what a target would change, before any training", allow_abbrev=False)
    )
    _add_evaluate(commands.add_parser("evaluate", help="accuracy and markers of a base model and its checkpoints"))
    _add_compare(commands.add_parser("compare", help="runs beside one another: curves, differences, completions"))
    examples.add_arguments(commands.add_parser("examples", help="recipes and loops to begin with: list or copy them"))
    train = commands.add_parser(
        "train", help="train a model on your data with TRL; see popsd train --help", add_help=False
    )
    train.set_defaults(run=_train)
    bench = commands.add_parser(
        "bench", help="time, memory and accuracy beside the peers; see popsd bench --help", add_help=False
    )
    bench.set_defaults(run=_bench)
    doctor = commands.add_parser("doctor", help="what is installed, who would compute, and whether it is right")
    doctor.set_defaults(run=_doctor)
    options, rest = parser.parse_known_args(underscored(sys.argv[1:] if arguments is None else arguments))
    if rest and options.run not in (_train, _bench, _diagnose):
        known = commands.choices[options.command]._option_string_actions
        parser.error((text := f"unrecognized arguments: {' '.join(rest)}.") + did_you_mean(text, known))
    options.rest = rest
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        resumes = "" if options.run is _diagnose else "; the same command resumes"
        print(f"popsd {options.command}: interrupted{resumes}.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"popsd {options.command}: {error}", file=sys.stderr)
    except ImportError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(f"popsd {options.command} needs {error.name}: pip install 'popsd[{extra}]'", file=sys.stderr)
    return 2


def underscored(arguments: Sequence[str]) -> list[str]:
    """Options in the spelling of all sub-commands, so that ``--output-dir`` is ``--output_dir``. Their values stay.

    >>> underscored(["demo", "--output-dir=runs/my-run", "--seeds", "-1", "my-name"])
    ['demo', '--output_dir=runs/my-run', '--seeds', '-1', 'my-name']
    """

    def spelt(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument

    return [spelt(argument) for argument in arguments]


def _version() -> str:
    try:
        return metadata.version("popsd")
    except metadata.PackageNotFoundError:  # run from its sources
        from popsd import __version__

        return __version__


_TRAINING = ("transformers", "tokenizers", "peft", "trl", "accelerate", "datasets", "tqdm")
_EXTRA_OF = dict.fromkeys(_TRAINING, "trl") | {"matplotlib": "plots", "math_verify": "eval"}


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where results go (%(default)s)")
    parser.add_argument("--cache_dir", type=Path, default=None, help="where warm-ups are kept (XDG cache, popsd/)")
    parser.add_argument("--seeds", type=int, default=1, help="runs per target (%(default)s)")
    parser.add_argument("--warmup_seed", type=int, default=0, help="seed of the base model (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="distillation steps (%(default)s)")
    parser.add_argument("--lora", action="store_true", help="LoRA of rank 8 instead of full fine-tuning")
    parser.add_argument("--processes", type=int, default=None, help="runs at a time (one per core)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from popsd_integrations.miniature import report
    from popsd_integrations.miniature.experiment import ExperimentConfig, run_experiment
    from popsd_integrations.miniature.warmup import WarmupConfig

    config = ExperimentConfig(
        seeds=options.seeds,
        steps=options.steps,
        lora_rank=8 if options.lora else None,
        learning_rate=1e-3 if options.lora else ExperimentConfig.learning_rate,
        warmup=WarmupConfig(seed=options.warmup_seed),
    )
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes: expected at least 1; got {options.processes}.")
    output: Path = options.output_dir
    print("Train a small reasoner, then distil it twice on its own completions: standard OPSD and purified OPSD.")
    results = run_experiment(config, output, options.cache_dir or _cache_dir(), processes=options.processes)
    print("\n" + report.table(results) + "\n")
    try:
        plots = report.plot(results, output)
    except ImportError:
        plots = []
        print("No plots: matplotlib is missing (pip install 'popsd[plots]').")
    report.write_html(results, plots, output / "report.html")
    written = ", ".join(str(output / name) for name in ("results.json", "report.html", *(path.name for path in plots)))
    print(f"{results['seconds']['total']:.0f} s. Written: {written}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from popsd_integrations.trl_trainer import command

    return command.main(options.rest)


def _bench(options: argparse.Namespace) -> int:
    from popsd_benchmarks import command

    return command.main(options.rest)


def _doctor(options: argparse.Namespace) -> int:
    from popsd_integrations import doctor

    return doctor.run()


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    from popsd_integrations.diagnose.command import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_diagnose)


def _diagnose(options: argparse.Namespace) -> int:
    from popsd_integrations.diagnose import command

    return command.run(options, options.cache_dir or _cache_dir())


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from popsd_integrations.evaluate import command

    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="folders of runs or evaluations; folder or label=folder")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="where files go (%(default)s)")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from popsd_integrations.evaluate import compare

    return compare.run(options.runs, options.output_dir)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "popsd"


if __name__ == "__main__":
    sys.exit(main())
