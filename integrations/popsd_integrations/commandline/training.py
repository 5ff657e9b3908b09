"""``popsd train`` before TRL is imported: its help, and every error that names and values alone show."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from popsd_integrations.commandline.devices import device_named
from popsd_integrations.commandline.inherited import inherited
from popsd_integrations.commandline.kinds import FALSE, TRUE, Option, boolean, json_object
from popsd_integrations.commandline.options import GROUPS, LOSS_TARGETS, own_options
from popsd_integrations.commandline.places import check_data, check_folder, check_model
from popsd_integrations.commandline.suggest import Parser, did_you_mean

_NAMES, _WIDTH = 34, 120
_VALUES = {"int": "N", "float": "X", "list": "WORD ...", "bool": "", "json": "JSON"}
_USUAL = """\
usage: popsd train --model_name_or_path MODEL --dataset_name DATA [--config FILE.yaml] [option value ...]
Every option may stand in the YAML file too. --help-all has all of TRL's; the most used:
  --output_dir --use_peft --lora_r --dtype --max_steps --per_device_train_batch_size --gradient_accumulation_steps
  --temperature --eval_strategy --dataset_test_split --test_split_size --use_vllm --report_to"""


class TrainParser(Parser):
    """The parser of names and values. It takes what TRL's parser takes."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, add_help=False)
        self.add_argument("--config")
        self.add_argument("--help_all", action="store_true")
        for option in known_options().values():
            option.add_to(self)


def known_options() -> dict[str, Option]:
    return inherited() | own_options()


def short_help() -> str:
    """The own options by group, a line each: the first sentence of their help."""
    options = own_options()
    grouped = " ".join(GROUPS.values()).replace("+", " ").split()
    further = {"Further": " ".join(name for name in options if name not in grouped)}
    lines = _USUAL.splitlines()
    for group, names in (GROUPS | further).items():
        lines += [f"{group}:", *(_line(name, options) for name in names.split())] if names else []
    return "\n".join(lines) + "\n"


def _line(names: str, options: Mapping[str, Option]) -> str:
    chosen = [options[name] for name in names.split("+")]
    first, joined = chosen[0], ", ".join(f"--{option.name}" for option in chosen)
    value = _VALUES | {"choice": "|".join(first.choices)}
    text, default = first.help.split(". ")[0].rstrip("."), first.default
    shown = default not in (None, False) and isinstance(default, str | int | float) and str(default) not in text
    left = f"  {joined} {value.get(first.kind, 'TEXT')}".rstrip()
    return _shortened(f"{left:<{_NAMES}}  {text}", f" ({default})" if shown else "")


def _shortened(line: str, end: str) -> str:
    """A line with its end, cut where it would wrap."""
    room = _WIDTH - len(end)
    return (line if len(line) <= room else f"{line[: room - 1].rstrip()}…") + end


def given_options(given: Sequence[str], trains: bool = True, known: Iterable[str] = ()) -> dict[str, Any]:
    """What flags, and the file that they name, say; values of flags as their kinds, those of the file as YAML has them.

    trains: False for ``popsd diagnose``, which has read the ``known`` ones. Exits with a line on a flag that is unknown or a
    value that it cannot take. Raises ValueError for the rest: a file that cannot be read, a key of it that is unknown, a model
    or data that is not named or not there.
    """
    if trains and {"-h", "--help"} & set(given):
        print(short_help(), end="")
        raise SystemExit(0)
    parser = TrainParser("popsd train" if trains else "popsd diagnose")
    parser.known = known
    flags, rest = parser.parse_known_args(list(given))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    own = {name: value for name, value in vars(flags).items() if name not in ("config", "help_all")}
    if flags.help_all:
        return {}
    values = ({} if flags.config is None else _of_file(Path(flags.config))) | own
    _check(values)
    if not trains and is_true(values.get("dry_run")):
        raise ValueError("dry_run: expected none with diagnose, which trains nothing; got it. Leave it out.")
    return values


def _of_file(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"config: expected a YAML file that can be read; got {str(path)!r} ({reason}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: expected lines of 'option: value' in {path}; got {type(values).__name__}.")
    values.pop("env", None)  # environment variables, which TRL sets
    options = known_options()
    for name, value in values.items():
        if name not in options:
            near = did_you_mean(f"--{name}", [f"--{known}" for known in options]).replace("--", "")
            raise ValueError(f"config: expected options of popsd train in {path}; got {name!r}.{near}")
        if problem := options[name].problem(value):
            raise ValueError(f"{name}: {problem[:-1]} in {path}.")
    return values


def _check(values: Mapping[str, Any]) -> None:
    model, data = values.get("model_name_or_path"), values.get("dataset_name")
    if not model:
        raise ValueError(
            "model_name_or_path: expected a model; got none. Pass --model_name_or_path or set it in --config."
        )
    if bool(values.get("datasets")) == bool(data):
        raise ValueError(
            "dataset_name: expected it or a mixture in `datasets`, and not both; a folder with train.jsonl will do."
        )
    check_model(model)
    if values.get("output_dir"):
        check_folder("output_dir", values["output_dir"])
    if data:
        check_data(data)
    target = values.get("loss_target")
    # where Python code called the command line, it may have registered further ones
    registry = sys.modules.get("popsd.engine.chunks.registry")
    targets = LOSS_TARGETS if registry is None else registry.known_targets()
    if target is not None and ":" not in str(target) and target not in targets:
        raise ValueError(f"loss_target: expected one of {', '.join(targets)}, or module:name; got {target!r}.")
    if (column := values.get("answer_column")) is not None and values.get("eval_scorer") is None:
        raise ValueError(f"answer_column: expected none without eval_scorer; got {column!r}.")
    if (device := values.get("device")) is not None:
        if not is_true(values.get("dry_run")):
            raise ValueError(f"device: expected none without dry_run, which plans for it; got {device!r}.")
        device_named(device)
    resumed = values.get("resume_from_checkpoint")
    if resumed and str(resumed).lower() not in (*TRUE, *FALSE, "none") and not Path(resumed).is_dir():
        raise ValueError(f"resume_from_checkpoint: expected a folder, true or false; there is no folder {resumed!r}.")
    own = own_options()
    for name, value in values.items():
        if known_options()[name].kind == "json" and isinstance(value, str) and (name in own or value.startswith("{")):
            try:
                json_object(value)
            except ArgumentTypeError as error:
                raise ValueError(f"{name}: {error}") from error


def is_true(value: Any) -> bool:
    """Of a truth value as a flag or a file has it."""
    return boolean(value) if isinstance(value, str) else bool(value)
