"""The ``popsd`` command. Each sub-command imports what it needs when it runs, and names the extra that is missing."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from popsd_integrations.commandline import examples
from popsd_integrations.commandline.places import check_folder
from popsd_integrations.commandline.suggest import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a problem that `doctor` found, 2 for bad input or a missing
    extra, 130 after an interrupt.
    """
    parser, commands = build_parser()
    options, rest = parser.parse_known_args(underscored(sys.argv[1:] if arguments is None else arguments))
    if rest and options.run not in (_train, _bench, _diagnose):
        commands[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        resumes = "; the same command resumes" if options.command in ("demo", "evaluate", "train", "bench") else ""
        print(f"popsd {options.command}: interrupted{resumes}.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        said = f"popsd {options.command}: {error}"
    except TypeError as error:
        if not re.match(r"[\w.\[\]]+: expected ", str(error)):  # of this form it is a refusal
            raise
        said = f"popsd {options.command}: {error}"
    except ImportError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is not None:
            said = f"popsd {options.command} needs {error.name}: pip install 'popsd[{extra}]'"
        elif error.name is None or isinstance(error, metadata.PackageNotFoundError):  # which says what to install
            said = f"popsd {options.command}: {error}"
        else:
            raise
    print(" ".join(said.split()), file=sys.stderr)
    return 2


def build_parser() -> tuple[Parser, Mapping[str, Parser]]:
    """The parser, and those of the commands by name. That of ``train`` is in `popsd_integrations.commandline.training`."""
    parser = Parser(
        prog="popsd", description="Purified on-policy self-distillation: train, look before and after, measure."
    )
    parser.add_argument("--version", action="version", version=f"popsd {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands.add_parser("demo", help="watch OPSD destroy a small reasoner and the purified loss keep it"))
    _add_diagnose(commands.add_parser("diagnose", help="what a target would change, before any training"))
    _add_init(commands.add_parser("init", help="write a commented configuration for your model and data"))
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
    return parser, commands.choices


def underscored(arguments: Sequence[str]) -> list[str]:
    """Options in the spelling of all sub-commands, so that ``--output-dir`` is ``--output_dir``. Their values stay.

    >>> underscored(["demo", "--output-dir=runs/my-run", "--num-seeds", "-1", "my-name"])
    ['demo', '--output_dir=runs/my-run', '--num_seeds', '-1', 'my-name']
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
    parser.add_argument("--num_seeds", type=int, default=1, help="runs of each target (%(default)s)")
    parser.add_argument("--warmup_seed", type=int, default=0, help="seed of the base model (%(default)s)")
    parser.add_argument("--max_steps", type=int, default=50, help="distillation steps (%(default)s)")
    parser.add_argument("--use_peft", action="store_true", help="LoRA of rank 8 instead of full fine-tuning")
    parser.add_argument("--num_processes", type=int, default=None, help="runs at a time (one per core)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    for name in ("num_seeds", "max_steps", "num_processes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1; got {getattr(options, name)}.")
    output: Path = options.output_dir
    check_folder("output_dir", output)
    check_folder("cache_dir", options.cache_dir or _cache_dir())
    from popsd_integrations.miniature import report
    from popsd_integrations.miniature.experiment import ExperimentConfig, run_experiment
    from popsd_integrations.miniature.warmup import WarmupConfig

    config = ExperimentConfig(
        num_seeds=options.num_seeds,
        max_steps=options.max_steps,
        lora_rank=8 if options.use_peft else None,
        learning_rate=1e-3 if options.use_peft else ExperimentConfig.learning_rate,
        warmup=WarmupConfig(seed=options.warmup_seed),
    )
    print("Train a small reasoner, then distil it twice on its own completions: standard OPSD and purified OPSD.")
    results = run_experiment(config, output, options.cache_dir or _cache_dir(), processes=options.num_processes)
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
    if _helped(options.rest):
        return 0
    from popsd_integrations.trl_trainer import command

    return command.main(options.rest)


def _helped(rest: Sequence[str], trains: bool = True, known: Sequence[str] = ()) -> bool:
    """Refuse what names and values alone show, before TRL is imported. True where the help of all options was asked for."""
    from popsd_integrations.commandline.training import given_options

    given_options(rest, trains, known)
    if "--help_all" not in rest:
        return False
    from popsd_integrations.trl_trainer import command

    command.full_parser().print_help()
    return True


def _bench(options: argparse.Namespace) -> int:
    from popsd_benchmarks import command

    return command.main(options.rest)


def _doctor(options: argparse.Namespace) -> int:
    from popsd_integrations import doctor

    return doctor.run()


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    from popsd_integrations.diagnose.command import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_diagnose, known=[*parser._option_string_actions])


def _diagnose(options: argparse.Namespace) -> int:
    if options.rest and _helped(options.rest, trains=False, known=options.known):
        return 0
    from popsd_integrations.diagnose import command

    return command.run(options, options.cache_dir or _cache_dir())


def _add_init(parser: argparse.ArgumentParser) -> None:
    from popsd_integrations.init import command

    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from popsd_integrations.evaluate import command

    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="folders of runs or evaluations; folder or label=folder")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="where files go (%(default)s)")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    check_folder("output_dir", options.output_dir)
    from popsd_integrations.evaluate import compare

    return compare.run(options.runs, options.output_dir)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "popsd"


if __name__ == "__main__":
    sys.exit(main())
