"""``popsd init``: options, what can be refused at once, and the file."""

from __future__ import annotations

import argparse
from pathlib import Path

from popsd_integrations.commandline.devices import device_named
from popsd_integrations.commandline.places import check_data, check_model

EPILOG = """\
The file is what popsd train --config FILE takes; popsd train --config FILE --dry_run shows the prompts. Other options are
changed in the file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options have the names that ``popsd train`` gives them."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("model_name_or_path", metavar="MODEL", help="name on the Hub or local folder of the model")
    add("dataset_name", metavar="DATA", help="name on the Hub, folder or file of rows (.jsonl, .json, .csv, .parquet)")
    add("--output", type=Path, default=Path("train.yaml"), help="the file to write (%(default)s)")
    add("--prompt_column", help="column with the questions (found by its name)")
    add("--solution_column", help="column with the reference solutions (found by its name)")
    add("--dataset_config", help="configuration of a dataset that has several")
    add("--dataset_train_split", help="split to train on (train, or the only one)")
    add("--device", help="plan the memory for this one, such as h100 or 24GiB (this machine's GPU)")


def run(options: argparse.Namespace) -> int:
    """Look, write and say what was found. Raises ValueError on bad input, before anything is written."""
    output: Path = options.output
    if output.exists():
        raise ValueError(f"output: expected a file that is not there yet; got {output}. Name another with --output.")
    if output.suffix not in (".yaml", ".yml") or not output.parent.is_dir():
        raise ValueError(f"output: expected a .yaml file in a folder that exists; got {output}.")
    check_model(options.model_name_or_path)
    check_data(options.dataset_name)
    if options.device is not None:
        device_named(options.device)
    from popsd_integrations.init.configuration import configuration

    text, prompts = configuration(options)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"output: expected a file that can be written; got {output} ({error.strerror}).") from error
    print(f"{prompts}\n\nWritten: {output}\n")
    print(f"Check: popsd train --config {output} --dry_run\nTrain: popsd train --config {output}")
    return 0
